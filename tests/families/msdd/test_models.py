"""Model parts that the authors' fixtures do not cover: rotary RoPE, positions, the cross block, dropout, sizes."""

import dataclasses

import pytest
import torch

from msdd_fast import Tokenizer
from msdd_fast.diffusion.rope import apply_rope, image_grid_positions, latent_grid_shape, latent_positions, rope_table
from msdd_fast.errors import InputError
from msdd_fast.families.msdd.config import RopeConfig, TokenizerConfig, swiglu_hidden_size
from msdd_fast.families.msdd.mmdit import ContextKeyValue, CrossBlock, Stream
from msdd_fast.families.msdd.presets import PRESETS
from tests.perturbed import perturbed

CPU = torch.device("cpu")


# --- RoPE ---------------------------------------------------------------------------------------------


def test_rotary_is_a_rotation_by_relative_position():
    """Norms are kept, and q.k depends on the difference of positions only, in both axes."""
    rows, cols = torch.tensor([0.0, 3.0, 5.5, 8.5]), torch.tensor([1.0, 2.0, 7.0, 8.0])
    table = rope_table(rows, cols, 64, 10000.0)
    q, k = torch.randn(64), torch.randn(64)
    rotated_q = apply_rope(q.expand(1, 4, 1, 64), table)[0, :, 0]
    rotated_k = apply_rope(k.expand(1, 4, 1, 64), table)[0, :, 0]
    torch.testing.assert_close(rotated_q.norm(dim=1), q.norm().expand(4))
    # Tokens 0 -> 1 and 2 -> 3 are both (3, 1) apart.
    torch.testing.assert_close(rotated_q[0] @ rotated_k[1], rotated_q[2] @ rotated_k[3], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(rotated_q[0] @ rotated_k[1], rotated_q[0] @ rotated_k[2])


def test_rotary_pairs_by_hand():
    """Interleaved pairs; the first half turns with the row, the second with the column."""
    table = rope_table(torch.tensor([2.0]), torch.tensor([3.0]), 8, 100.0)
    x = torch.zeros(1, 1, 1, 8)
    x[..., ::2] = 1.0
    angles = torch.tensor([2.0, 2.0 / 10, 3.0, 3.0 / 10])
    expected = torch.stack([angles.cos(), angles.sin()], dim=1).flatten()
    torch.testing.assert_close(apply_rope(x, table).flatten(), expected)


def test_cosine_variant_scales_both_members():
    table = rope_table(torch.tensor([2.0]), torch.tensor([3.0]), 8, 100.0, cosine_only=True)
    angles = torch.tensor([2.0, 2.0 / 10, 3.0, 3.0 / 10])
    out = apply_rope(torch.ones(1, 1, 1, 8), table).flatten()
    torch.testing.assert_close(out, angles.cos().repeat_interleave(2))


@pytest.mark.parametrize(("max_grid", "offsets"), [(32, {4: 14, 8: 12, 16: 8, 32: 0}), (16, {4: 6, 8: 4, 16: 0})])
def test_centered_positions(max_grid, offsets):
    for grid, offset in offsets.items():
        rows, cols = image_grid_positions(grid, max_grid, "centered", CPU)
        assert rows[0] == cols[0] == offset and rows[-1] == cols[-1] == offset + grid - 1
        assert rows[1] == rows[0] and cols[1] == cols[0] + 1  # row-major


@pytest.mark.parametrize("grid", [1, 2, 4, 8, 16])
def test_scaled_positions_are_the_means_of_what_a_token_covers(grid):
    rows, cols = image_grid_positions(grid, 16, "scaled", CPU)
    fine_rows, fine_cols = image_grid_positions(16, 16, "scaled", CPU)
    k = 16 // grid
    for fine, coarse in ((fine_rows, rows), (fine_cols, cols)):
        blocks = fine.view(grid, k, grid, k).mean(dim=(1, 3)).flatten()
        torch.testing.assert_close(coarse, blocks)


def test_latent_positions():
    rows, cols = latent_positions(128, 32, "row", 4, CPU)
    assert (rows == 4).all() and torch.equal(cols, torch.arange(128.0))
    assert latent_grid_shape(128) == (8, 16) and latent_grid_shape(16) == (4, 4) and latent_grid_shape(7) == (1, 7)
    rows, cols = latent_positions(128, 16, "grid", 0, CPU)
    assert rows.mean() == pytest.approx(7.5) and cols.mean() == pytest.approx(7.5)
    assert torch.equal(cols[:16], torch.arange(16.0)) and rows[16] - rows[0] == 2


def test_bfloat16_context_frequencies_differ_as_measured():
    """Angles differ by up to 0.05/0.22/0.21/0.07 rad for grids of 4/8/16/32 (docs/spec.md#rope)."""
    for grid, expected in ((4, 0.05), (8, 0.22), (16, 0.21), (32, 0.07)):
        rows, cols = latent_positions(128, 32, "row", grid, CPU)
        angles = []
        for dtype in (torch.float32, torch.bfloat16):
            table = rope_table(rows, cols, 64, 10000 * 128 / grid, frequency_dtype=dtype)
            angles.append(torch.atan2(table.sin, table.cos))
        difference = (angles[0] - angles[1] + torch.pi).remainder(2 * torch.pi) - torch.pi
        assert difference.abs().max().item() == pytest.approx(expected, abs=0.006)


# --- sizes --------------------------------------------------------------------------------------------


def count(config, part):
    with torch.device("meta"):
        return sum(p.numel() for p in getattr(Tokenizer(config), part).parameters())


def test_parameter_counts():
    """The authors' counts (docs/spec.md#authors-checkpoint) less the tensors that cannot influence a result."""
    dead_q = 768 * 768 + 768 + 2 * 64
    dead_encoder = 813_312 + 38_400 + dead_q + (768 * 768 + 768) + 2 * 768 + 3 * 768 * 2048
    joint = PRESETS["msdd-d12-joint"]
    assert count(joint, "decoder") == 249_617_344 - dead_q
    assert count(joint, "encoder") == 171_145_760 - dead_encoder
    assert count(PRESETS["msdd-d12-joint-3scale"], "decoder") == 250_502_656 - dead_q
    nano = PRESETS["msdd-nano"]
    assert count(nano, "encoder") + count(nano, "decoder") <= 10_000_000


def test_swiglu_sizes():
    assert [swiglu_hidden_size(768, 256), swiglu_hidden_size(128, 256), swiglu_hidden_size(256, 64)] == [2048, 512, 704]


# --- decoder ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["cross", "joint"])
def tiny(request):
    base = PRESETS["tiny"]
    return perturbed(dataclasses.replace(base, decoder=dataclasses.replace(base.decoder, conditioning=request.param)))


@torch.no_grad()
def test_every_scale_and_the_null_context(tiny):
    z, t = torch.randn(3, 16, 32), torch.tensor([1.0, 0.5, 0.1])
    for size in (8, 16, 24, 64):
        x = torch.randn(3, 3, size, size)
        v, v_null = tiny.decoder(x, t, z), tiny.decoder(x, t, None)
        assert v.shape == x.shape and not torch.allclose(v, v_null)
        mask = torch.tensor([True, False, True])
        mixed = tiny.decoder(x, t, z, mask)
        torch.testing.assert_close(mixed, torch.where(mask[:, None, None, None], v_null, v))


@torch.no_grad()
def test_every_latent_token_and_time_matter(tiny):
    x, z = torch.randn(1, 3, 16, 16), torch.randn(1, 16, 32)
    t = torch.tensor([0.5])
    v = tiny.decoder(x, t, z)
    assert not torch.allclose(v, tiny.decoder(x, torch.tensor([0.6]), z))
    for j in range(16):
        other = z.clone()
        other[:, j] += 1.0
        assert (tiny.decoder(x, t, other) - v).abs().max() > 1e-5


@pytest.mark.parametrize(
    ("x", "t", "z", "message"),
    [
        (torch.zeros(1, 3, 16, 8), torch.ones(1), None, r"x_t must be \(B, 3, H, H\), got \(1, 3, 16, 8\)"),
        (torch.zeros(1, 3, 12, 12), torch.ones(1), None, "multiple of the patch size 8 and at most 64, got 12"),
        (torch.zeros(1, 3, 128, 128), torch.ones(1), None, "multiple of the patch size 8 and at most 64, got 128"),
        (torch.zeros(2, 3, 16, 16), torch.ones(1), None, r"t must be \(2,\), one model time per image, got \(1,\)"),
        (torch.zeros(1, 3, 16, 16), torch.ones(1), torch.zeros(1, 4, 32), r"z must be \(1, 16, 32\), got \(1, 4, 32\)"),
    ],
)
def test_bad_decoder_input(tiny, x, t, z, message):
    with pytest.raises(InputError, match=message):
        tiny.decoder(x, t, z)


def test_cross_block_by_hand():
    """x += gate * W_o(Attn(q,k,v) + Attn(q,K,V)); x += gate * SwiGLU, written out with plain softmax."""
    torch.manual_seed(0)
    width, d = 64, 32
    block = CrossBlock(Stream(width, d, 32, adaln=True), ContextKeyValue(width, d)).double()
    x, c, ctx = (torch.randn(2, n, width, dtype=torch.float64) for n in (4, 1, 3))
    c = c[:, 0]
    image_rope = rope_table(torch.arange(4.0), torch.arange(4.0), d, 100.0)
    context_rope = rope_table(torch.arange(3.0), torch.arange(3.0), d, 100.0)
    s = block.image

    def norm(a, layer=None):
        out = (a - a.mean(-1, keepdim=True)) / (a.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return out if layer is None else out * layer.weight + layer.bias

    def heads(a):
        return a.view(2, -1, 2, d)

    def softmax_attention(q, k, v):
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / d**0.5
        return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).reshape(2, -1, width)

    m = s.adaln.linear(torch.nn.functional.silu(c)).view(2, 6, 1, width).unbind(1)
    h = norm(x) * (1 + m[1]) + m[0]
    q, k, v = (heads(a) for a in s.qkv(h).chunk(3, dim=-1))
    q, k = apply_rope(norm(q, s.q_norm), image_rope), apply_rope(norm(k, s.k_norm), image_rope)
    ck, cv = (heads(a) for a in block.context.kv(ctx).chunk(2, dim=-1))
    ck = apply_rope(norm(ck, block.context.k_norm), context_rope)
    y = x + m[2] * s.proj(softmax_attention(q, k, v) + softmax_attention(q, ck, cv))
    h = norm(y) * (1 + m[4]) + m[3]
    y = y + m[5] * s.mlp.w2(torch.nn.functional.silu(s.mlp.w1(h)) * s.mlp.w3(h))
    out = block(x, c, image_rope, block.context(ctx, context_rope))
    torch.testing.assert_close(out, y, rtol=1e-6, atol=1e-6)  # RoPE itself runs in float32


@torch.no_grad()
def test_cross_context_keys_serve_every_scale():
    """K and V of the context depend on z alone: the same table whatever the grid."""
    decoder = perturbed("tiny").decoder
    tables = [decoder.rope_tables(grid, CPU)[0] for grid in (1, 2, 8)]
    for other in tables[1:]:
        assert torch.equal(tables[0].cos, other.cos) and torch.equal(tables[0].sin, other.sin)
    row = dataclasses.replace(PRESETS["tiny"], rope=RopeConfig(context_positions="row"))
    joint = dataclasses.replace(row, decoder=dataclasses.replace(row.decoder, conditioning="joint"))
    assert torch.equal(*(perturbed(row).decoder.rope_tables(g, CPU)[0].cos for g in (1, 8)))
    assert not torch.equal(*(perturbed(joint).decoder.rope_tables(g, CPU)[0].cos for g in (1, 8)))


# --- initialisation -----------------------------------------------------------------------------------


@torch.no_grad()
def test_passthrough_velocity_starts_near_the_input():
    torch.manual_seed(0)
    decoder = Tokenizer.from_config("msdd-nano").decoder
    x, z = 0.7 * torch.randn(1, 3, 32, 32), torch.randn(1, 128, 32)
    v = decoder(x, torch.tensor([0.5]), z)
    assert torch.corrcoef(torch.stack([x.flatten(), v.flatten()]))[0, 1] > 0.5
    zero = dataclasses.replace(PRESETS["msdd-nano"].decoder, velocity_init="zero")
    decoder = Tokenizer.from_config(dataclasses.replace(PRESETS["msdd-nano"], decoder=zero)).decoder
    assert not decoder(x, torch.tensor([0.5]), z).any()


@torch.no_grad()
@pytest.mark.parametrize(("layer", "radius"), [(1, 1), (2, 2), (3, 4)])
def test_position_prior(layer, radius):
    """At initialisation head h of 4 looks ``radius`` patches down, right, up, left (content averaged out)."""
    torch.manual_seed(0)
    config = PRESETS["msdd-nano"]
    decoder = Tokenizer.from_config(config).decoder
    _, rope = decoder.rope_tables(16, CPU)
    stream = decoder.blocks[layer].image
    zero = stream.adaln(torch.zeros(1, 256))
    q, k, _ = stream.qkv_heads(torch.randn(1, 256, 256), zero, rope)
    for _ in range(15):
        more = stream.qkv_heads(torch.randn(1, 256, 256), zero, rope)
        q, k = q + more[0], k + more[1]
    best = torch.einsum("bqhd,bkhd->bhqk", q, k)[0, :, 8 * 16 + 7].argmax(-1)
    found = torch.stack([best // 16 - 8, best % 16 - 7], dim=1)
    expected = radius * torch.tensor([[1, 0], [0, 1], [-1, 0], [0, -1]])
    assert (found - expected).abs().max() <= 1
    assert (found == expected).all(dim=1).sum() >= 3


@torch.no_grad()
def test_position_prior_reaches_the_context():
    """An image token's strongest latent tokens are near its own place, in every head and layer."""
    torch.manual_seed(0)
    config = PRESETS["msdd-nano"]
    decoder = Tokenizer.from_config(config).decoder
    context_rope, image_rope = decoder.rope_tables(config.grid_size, CPU)
    context = decoder.context_norm(decoder.context_embed(torch.randn(1, 128, 32)))
    for block in decoder.blocks:
        q, _, _ = block.image.qkv_heads(torch.randn(1, 256, 256), block.image.adaln(torch.zeros(1, 256)), image_rope)
        k, _ = block.context(context, context_rope)
        weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) / 8).softmax(-1)
        token = torch.arange(256)
        best = weights.argmax(-1)[0]
        distance = torch.hypot((best // 16 * 2 + 0.5) - token // 16, (best % 16).float() - token % 16)
        assert distance.median() < 5


def test_position_prior_can_be_off():
    off = dataclasses.replace(PRESETS["tiny"], rope=RopeConfig(position_prior=0.0))
    for name, p in Tokenizer.from_config(off).named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            assert (p == 1).all()


def test_latent_norm():
    tok = perturbed("tiny")
    z = tok.encode(torch.rand(2, 3, 64, 64) * 2 - 1)
    assert z.mean(-1).abs().max() < 1e-5 and (z.var(-1, unbiased=False) - 1).abs().max() < 1e-2


def test_default_presets_are_the_documented_models():
    assert TokenizerConfig() == PRESETS["msdd-d12"]
    assert PRESETS["msdd-d12"].decoder.conditioning == "cross"
    assert PRESETS["msdd-d12-single-scale"].schedule.num_stages == 1
    assert PRESETS["msdd-d12-joint-3scale"].patch_size == 16
