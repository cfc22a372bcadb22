"""SSDD: the authors' tensors through the public API (fp32, 1e-5), released names and sizes, shapes, errors."""

import ast
import dataclasses
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from msdd_fast import Tokenizer, ops
from msdd_fast.backends import use_backend
from msdd_fast.diffusion.config import ScheduleConfig
from msdd_fast.diffusion.noise import start_noise
from msdd_fast.diffusion.schedule import StageSchedule
from msdd_fast.errors import CheckpointError, ConfigError, InputError
from msdd_fast.families import config_from_dict, get_preset
from msdd_fast.families.ssdd.config import SSDDConfig
from msdd_fast.families.ssdd.presets import SSDD_PRESETS
from msdd_fast.families.ssdd.released import release_ssdd, translate_ssdd
from msdd_fast.ops.window_attention import dense_bias
from tests.draws import generator

TOLERANCE = 1e-5
TINY = SSDD_PRESETS["tiny-ssdd"]
# With three transformer blocks, one of which can be outvoted.
SMALL = dataclasses.replace(TINY, decoder=dataclasses.replace(TINY.decoder, mid_layers=3))


def near(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def random_tokenizer(config=TINY, seed=0):
    """No parameter at zero or at any other special value, so that every tensor moves the output."""
    tok = Tokenizer.from_config(config)
    g = generator(seed)
    for name, p in tok.named_parameters():
        fan_in = p[0].numel() if p.ndim > 1 else 1
        scale = 0.3 if p.ndim == 1 or "table" in name else fan_in**-0.5
        p.copy_(torch.randn(p.shape, generator=g) * scale + (1.0 if p.ndim == 1 and "norm" in name else 0.0))
    return tok


@pytest.fixture(scope="module")
def tiny():
    return random_tokenizer()


@pytest.fixture(scope="module")
def small():
    return random_tokenizer(SMALL)


@pytest.fixture(scope="module")
def released(small):
    """What a released file of the small tokenizer would hold."""
    return release_ssdd(small.state_dict())


def imported(state, **kwargs):
    return Tokenizer.from_ssdd_checkpoint(state, image_size=64, groups=8, **kwargs)


# --- the authors' tensors


@pytest.fixture(scope="module")
def case(shared_dir):
    folder = shared_dir / "fixtures"
    tensors = {
        **load_file(folder / "ssdd_small_64px.safetensors"),
        **load_file(folder / "ssdd_encoder_64px.safetensors"),
    }
    state = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    return imported(state), {k.removeprefix("case."): v for k, v in tensors.items() if k.startswith("case.")}


@torch.no_grad()
def test_velocities(case):
    tok, tensors = case
    for i in range(2):
        v = tok.decoder(tensors[f"velocity.{i}.x"], tensors[f"velocity.{i}.t"], tensors["z"])
        near(-v, tensors[f"velocity.{i}.v"])  # theirs is the image minus the noise


@pytest.mark.parametrize("steps", [1, 4])
def test_decodes(case, steps):
    tok, tensors = case
    x = tok.decode(tensors["z"], steps=steps, noise=[tensors["decode.noise"]])
    near(x, tensors[f"decode.steps{steps}"])


@torch.no_grad()
def test_encoder(case):
    tok, tensors = case
    posterior = tok.encoder.posterior(tensors["encode.x"])
    near(tok.encode(tensors["encode.x"]), tensors["encode.mean"])
    near(posterior.logvar, tensors["encode.logvar"])
    near(posterior.kl(), tensors["encode.kl"])


# --- released names and sizes


@pytest.mark.parametrize("size", ["S", "M"])
def test_names_and_shapes_of_released_files(size, shared_dir):
    lines = (shared_dir / "fixtures" / f"ssdd_keys_{size}_f8c4.txt").read_text().splitlines()
    expected = {name: ast.literal_eval(shape) for name, shape in (line.split(" ", 1) for line in lines)}
    with torch.device("meta"):
        tok = Tokenizer(get_preset(f"ssdd-{size.lower()}-f8c4"))
    assert {name: tuple(t.shape) for name, t in tok.state_dict().items()} == expected


def test_parameter_counts():
    """Parameters of every size (docs/spec.md#ssdd-network, docs/spec.md#ssdd-encoder)."""
    decoders = dict(xs=4_996_611, s=14_057_059, b=21_140_459, m=50_280_147, l=90_759_939, xl=161_272_835, h=362_688_003)
    with torch.device("meta"):
        for size, count in decoders.items():
            decoder = Tokenizer(SSDD_PRESETS[f"ssdd-{size}-f8c4"]).decoder
            assert sum(p.numel() for p in decoder.parameters()) == count, size
        encoders = [Tokenizer(SSDD_PRESETS[f"ssdd-xs-f{f}c4"]).encoder for f in (8, 16)]
    counts = [sum(p.numel() for p in e.parameters()) for e in encoders]
    assert counts[0] == 34_163_664 and counts[1] == pytest.approx(45.97e6, rel=1e-4)


@pytest.mark.parametrize(("size", "gflop"), [("s", 174.0), ("m", 538.8)])
def test_flops(size, gflop):
    """As many as the authors' network: one evaluation at 256 px, dense attention."""
    with torch.device("meta"), torch.no_grad(), use_backend("eager"), FlopCounterMode(display=False) as counter:
        decoder = Tokenizer(get_preset(f"ssdd-{size}-f8c4")).decoder
        decoder(torch.empty(1, 3, 256, 256), torch.empty(1), torch.empty(1, 4, 32, 32))
    assert counter.get_total_flops() / 1e9 == pytest.approx(gflop, rel=0.01)


# --- import and export


def test_import_reads_every_size_from_shapes(small, released):
    tok = imported(released, steps=2)
    assert tok.config == SMALL
    for name, tensor in small.state_dict().items():
        assert torch.equal(tensor, tok.state_dict()[name]), name


def test_f16_sizes_are_read_too():
    config = dataclasses.replace(
        TINY, factor=16, latent_channels=3, decoder=dataclasses.replace(TINY.decoder, window=3)
    )
    tok = Tokenizer.from_config(config)
    assert imported(release_ssdd(tok.state_dict()), steps=2).config == config


def test_import_does_not_share_memory(released):
    tok = imported(released)
    with torch.no_grad():
        tok.decoder.conv_in.weight.zero_()
    assert released["decoder.conv_in.weight"].any()


def test_files_round_trip(tiny, tmp_path):
    """Their file -> ours -> their file: the same tensors; the sign of the last convolution is theirs in the file."""
    path = tmp_path / "a.safetensors"
    tiny.export_released(path)
    assert torch.equal(load_file(path)["decoder.conv_out.weight"], -tiny.decoder.conv_out.weight)
    tok = imported(path)
    tok.export_released(tmp_path / "b.safetensors")
    a, b = load_file(path), load_file(tmp_path / "b.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    torch.save(a, tmp_path / "a.pt")
    assert torch.equal(imported(tmp_path / "a.pt").decoder.conv_out.weight, tiny.decoder.conv_out.weight)
    with pytest.raises(InputError, match="tokenizer must be of the family ssdd or pid, got msdd"):
        Tokenizer.from_config("tiny").export_released(tmp_path / "c.safetensors")


def test_half_precision_files_load_as_float32(released):
    tok = imported({n: t.bfloat16() for n, t in released.items()})
    assert {p.dtype for p in tok.parameters()} == {torch.float32}


def one_error(state):
    with pytest.raises(CheckpointError) as error:
        imported(state)
    return str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        "decoder.conv_in.weight",
        "decoder.down_blocks.1.resnets.0.norm2.weight",
        "decoder.mid_block.transformer_blocks.2.relative_position_bias.relative_bias_table",
        "encoder.out_proj.bias",
        "encoder.down.0.block.0.conv1.bias",
    ],
)
def test_one_wrong_tensor_is_the_one_named(released, name):
    """Also where a size is read from it: the others outvote it."""
    tensor = released[name]
    rest = {n: t for n, t in released.items() if n != name}
    head = "state dict: weights do not match the config: "
    assert one_error(rest) == f"{head}missing {name} {tuple(tensor.shape)}"
    for wrong in (torch.zeros(*tensor.shape, 2), torch.zeros(tensor.shape[0] + 8, *tensor.shape[1:]), torch.zeros(())):
        shapes = f"the config asks for {tuple(tensor.shape)}, the weights have {tuple(wrong.shape)}"
        assert one_error({**rest, name: wrong}) == f"{head}{name}: {shapes}"


def test_no_single_tensor_misleads_the_sizes(released):
    sizes = dict(image_size=64, steps=2, groups=8)
    for name, tensor in released.items():
        if not re.search(r"table|norm2|out_proj|conv_out|\.0\.block\.", name):  # what sizes are read from, and more
            continue
        rest = {n: t for n, t in released.items() if n != name}
        wrong = torch.zeros(tensor.shape[0] + 8, *tensor.shape[1:])
        assert translate_ssdd(rest, **sizes)[0] == translate_ssdd({**rest, name: wrong}, **sizes)[0] == SMALL, name


def test_unexpected_tensors_are_named(released):
    assert "unexpected decoder.conv_mid.weight (2, 3)" in one_error(
        {**released, "decoder.conv_mid.weight": torch.zeros(2, 3)}
    )


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "state dict: not a state dict: expected names mapped to tensors"),
        ({"a": 3}, "state dict: not a state dict: expected names mapped to tensors"),
        ({"a": torch.zeros(1)}, "state dict: not an SSDD tokenizer: "),
    ],
)
def test_foreign_states(state, message):
    assert one_error(state).startswith(message)


def test_impossible_groups(released):
    with pytest.raises(CheckpointError, match=r"decoder\.widths must be 4 positive multiples of groups=32"):
        Tokenizer.from_ssdd_checkpoint(released)


def test_damaged_file(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"12345678")
    with pytest.raises(CheckpointError, match=r"x\.safetensors is damaged"):
        imported(tmp_path / "x.safetensors")


def test_save_pretrained_round_trip(tiny, tmp_path):
    for _ in range(2):  # the second time over an older checkpoint
        tiny.save_pretrained(tmp_path / "tok")
    tok = Tokenizer.from_pretrained(tmp_path / "tok")
    assert tok.config == tiny.config
    z = torch.randn(1, 4, 8, 8, generator=generator())
    near(tok.decode(z), tiny.decode(z))


# --- encode and decode


@pytest.mark.parametrize(("height", "width", "factor"), [(32, 64, 8), (8, 24, 8), (64, 32, 16), (16, 16, 16)])
def test_rectangles(height, width, factor):
    """Any multiple of the factor: also smaller than the window, and odd numbers of cells."""
    tok = random_tokenizer(dataclasses.replace(TINY, factor=factor))
    images = torch.rand(2, 3, height, width, generator=generator()) * 2 - 1
    z = tok.encode(images)
    assert z.shape == (2, 4, height // factor, width // factor)
    x = tok.decode(z, seed=[3, 5])
    assert x.shape == images.shape and x.dtype == torch.float32 and x.isfinite().all()


@torch.no_grad()
def test_transposed_weights_transpose_the_image(tiny):
    """The network on a turned image with turned kernels is the turned network: rows and columns are not mixed up."""
    turned = random_tokenizer()
    for p in turned.decoder.parameters():
        if p.ndim == 4:
            p.copy_(p.transpose(2, 3).clone())
        elif p.ndim == 3:
            p.copy_(p.transpose(0, 1).clone())
    x, z = torch.randn(1, 3, 32, 64, generator=generator()), torch.randn(1, 4, 4, 8, generator=generator(1))
    t = torch.tensor([0.7])
    a = tiny.decoder(x, t, z)
    b = turned.decoder(x.transpose(2, 3), t, z.transpose(2, 3))
    torch.testing.assert_close(b.transpose(2, 3), a, rtol=1e-4, atol=1e-4)


def test_an_image_depends_on_its_own_seed_only(tiny):
    z = torch.randn(3, 4, 4, 4, generator=generator())
    x = tiny.decode(z, seed=[7, 8, 9], steps=3)
    torch.testing.assert_close(tiny.decode(z[1:2], seed=8, steps=3), x[1:2], rtol=1e-4, atol=1e-5)
    noise = start_noise(torch.tensor([7, 8, 9]), (3, 32, 32))
    torch.testing.assert_close(tiny.decode(z, noise=[noise], steps=3), x, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_one_step_is_noise_minus_velocity(tiny):
    z = torch.randn(2, 4, 4, 4, generator=generator())
    noise = torch.randn(2, 3, 32, 32, generator=generator(1))
    x = tiny.decode(z, noise=[noise], steps=1)
    near(x, noise - tiny.decoder(noise, torch.ones(2), z))


def test_default_steps_come_from_the_config(tiny):
    z = torch.randn(1, 4, 4, 4, generator=generator())
    near(tiny.decode(z), tiny.decode(z, steps=2))
    assert (tiny.decode(z) - tiny.decode(z, steps=1)).abs().max() > 1e-2


def test_differentiable_to_every_parameter():
    """Through the decoder, the posterior and its KL; the bias tables too, after a first call without gradients."""
    tok = random_tokenizer().train()
    images = torch.rand(1, 3, 32, 32, generator=generator())
    tok.decode(tok.encode(images))
    posterior = tok.encoder.posterior(images)
    z = posterior.sample(torch.randn(1, 4, 4, 4, generator=generator()))
    loss = tok.decoder(images, torch.tensor([0.5]), z).square().mean() + posterior.kl().mean()
    loss.backward()
    assert [
        n for n, p in tok.named_parameters() if p.grad is None or not p.grad.any() or not p.grad.isfinite().all()
    ] == []


def test_changed_tables_act_at_once():
    """No memory of an earlier table: a trap of the authors' code (docs/spec.md#ssdd-network)."""
    tok = random_tokenizer()
    z = torch.randn(1, 4, 8, 8, generator=generator())
    before = tok.decode(z, steps=1)
    with torch.no_grad():
        for block in tok.decoder.mid_block.transformer_blocks:
            block.relative_position_bias.relative_bias_table.add_(torch.randn(7, 7, 2, generator=generator()))
    after = tok.decode(z, steps=1)
    fresh = Tokenizer(TINY).eval()
    fresh.load_state_dict(tok.state_dict())
    assert (after - before).abs().max() > 1e-3
    near(after, fresh.decode(z, steps=1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tiny, dtype):
    tok = random_tokenizer().to(dtype)
    z = torch.randn(1, 4, 8, 8, generator=generator())
    x = tok.decode(z, steps=1)
    assert x.dtype == torch.float32
    exact = tiny.decode(z, steps=1)
    assert (x - exact).abs().max() < 0.1 * exact.abs().max()


def test_window_attention_by_hand():
    """One query at a time, keys of its window only."""
    height, width, w, heads, d = 5, 7, 3, 2, 4
    g = generator()
    q, k, v = torch.randn(3, 1, height * width, heads, d, generator=g)
    table = torch.randn(2 * w - 1, 2 * w - 1, heads, generator=g)
    expected = torch.zeros_like(q)
    for h in range(heads):
        for i in range(height * width):
            near = [
                (j, i // width - j // width, i % width - j % width)
                for j in range(height * width)
                if abs(i // width - j // width) < w and abs(i % width - j % width) < w
            ]
            score = [q[0, i, h] @ k[0, j, h] / d**0.5 + table[y + w - 1, x + w - 1, h] for j, y, x in near]
            p = torch.stack(score).softmax(0)
            expected[0, i, h] = sum(a * v[0, j, h] for a, (j, _, _) in zip(p, near, strict=True))
    for backend in ("eager", "sdpa"):
        torch.testing.assert_close(ops.window_attention(q, k, v, table, height, width, backend=backend), expected)


def test_relative_bias_outside_the_window_is_finite():
    bias = dense_bias(torch.zeros(3, 3, 1), 3, 3)
    assert bias.shape == (1, 9, 9) and bias.min() == -1e7 and (bias == 0).sum() == 49


# --- initialisation, schedule, config


def test_initialisation():
    """What ends a residual branch is zero, convolutions N(0, 0.02), tables and biases zero."""
    tok = Tokenizer.from_config("ssdd-xs-f8c4")
    for name, p in tok.decoder.state_dict().items():
        if name.endswith((".bias", "table", "conv2.weight", "ff.proj_out.weight")):
            assert not p.any(), name
        elif p.ndim == 1:
            assert (p == 1).all(), name
        elif p.ndim == 4:
            assert p.std().item() == pytest.approx(0.02, rel=0.15), name
        else:
            assert p.std().item() == pytest.approx((2 / sum(p.shape)) ** 0.5, rel=0.05), name
    assert tok.encoder.conv_in.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_time_grid():
    schedule = StageSchedule(TINY.schedule)
    assert len(schedule) == 1
    times, t = schedule.time_grid(0, 4)
    assert t.tolist() == [1.0, 0.5625, 0.25, 0.0625, 0.0]
    assert times.tolist() == [1.0, 0.5625, 0.25, 0.0625]
    cubic = StageSchedule(ScheduleConfig(num_stages=1, time_grid="power", time_power=3.0))
    assert cubic.time_grid(0, 2)[1].tolist() == [1.0, 0.125, 0.0]
    for steps in (1, 3, 7, 50):
        times, t = schedule.time_grid(0, steps)
        expected = torch.linspace(1, 0, steps + 1, dtype=torch.float64) ** 2
        torch.testing.assert_close(t.double(), expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(times, t[:-1], rtol=2e-7, atol=0)


@pytest.mark.parametrize("name", SSDD_PRESETS)
def test_config_round_trip(name):
    config = get_preset(name)
    assert config_from_dict(json.loads(config.to_json())) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(factor=4), "factor must be 8 or a larger power of two .* got 4"),
        (dict(factor=24), "factor must be 8 or a larger power of two .* got 24"),
        (dict(image_size=100), "image_size must be a positive multiple of factor=8, got 100"),
        (dict(latent_channels=0), "latent_channels must be at least 1, got 0"),
        (dict(schedule=ScheduleConfig()), "schedule.num_stages must be 1 for SSDD, got 4"),
        (dict(decoder=dict(heads=5)), "decoder.heads must divide the last width 32, got 5"),
        (dict(decoder=dict(groups=5)), "decoder.widths must be 4 positive multiples of groups=5"),
        (dict(decoder=dict(mid_layers=0)), "decoder.mid_layers must be at least 1, got 0"),
        (dict(decoder=dict(window=0)), "decoder.window must be at least 1, got 0"),
        (dict(encoder=dict(channels=40)), "encoder.channels must be a positive multiple of 32 .* got 40"),
        (dict(sampling=dict(cfg_scale=2.0)), "sampling.cfg_scale must be 1 for SSDD"),
    ],
)
def test_impossible_configs(change, message):
    parts = {k: dataclasses.replace(getattr(TINY, k), **v) if isinstance(v, dict) else v for k, v in change.items()}
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(TINY, **parts)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"family": "ssdd", "num_latent_tokens": 128}, "config has unknown field 'num_latent_tokens'"),
        ({"family": "ssdd", "decoder": {"widths": [32, 64]}}, "config.decoder.widths must be a list of 4 values"),
        ({"family": "ssdd", "decoder": {"widths": [32, 64, 96, "96"]}}, r"decoder.widths\[3\] must be of type int"),
        ({"family": "vae"}, "unknown family '"),
    ],
)
def test_bad_config_data(data, message):
    with pytest.raises(ConfigError, match=message):
        config_from_dict(data)
    assert isinstance(config_from_dict({"family": "ssdd"}), SSDDConfig)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(num_stages=2, time_grid="power"), "time_grid 'power' is for one stage, got num_stages=2"),
        (dict(num_stages=1, time_grid="power", time_power=0.0), r"time_power must be in \(0, 100\], got 0.0"),
    ],
)
def test_impossible_schedules(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        ScheduleConfig(**kwargs)


# --- a user's mistakes


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 3, 64, 60), r"sides|H and W positive multiples of 8, got \(1, 3, 64, 60\)"),
        (torch.zeros(1, 4, 64, 64), r"images must have shape \(B, 3, H, W\)"),
        (torch.zeros(3, 64, 64), r"images must have shape \(B, 3, H, W\)"),
        ([1], "images must have shape .* got list"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "images must be floating point"),
        (torch.full((1, 3, 64, 64), torch.nan), "images must be finite, got NaN or Inf in item 0"),
    ],
)
def test_bad_images(tiny, images, message):
    with pytest.raises(InputError, match=message):
        tiny.encode(images)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(z=torch.zeros(1, 3, 8, 8)), r"z must have shape \(B, 4, h, w\), got \(1, 3, 8, 8\)"),
        (dict(z=torch.zeros(1, 4, 8, 0)), r"z must have shape \(B, 4, h, w\), got \(1, 4, 8, 0\)"),
        (dict(z=torch.zeros(1, 4, 8)), r"z must have shape \(B, 4, h, w\), got \(1, 4, 8\)"),
        (dict(z=torch.full((2, 4, 8, 8), torch.nan)), "z must be finite"),
        (dict(cfg_scale=2.0), r"cfg_scale must be 1 for an SSDD tokenizer \(it has no null context\), got 2.0"),
        (dict(steps=0), "steps must be an integer >= 1, got 0"),
        (dict(noise=[torch.zeros(1, 3, 64, 32)]), r"noise\[0\] must have shape \(1, 3, 64, 64\), got \(1, 3, 64, 32\)"),
        (dict(noise=[]), "noise must hold 1 tensors, one per stage, got 0"),
    ],
)
def test_bad_decodes(tiny, kwargs, message):
    with pytest.raises(InputError, match=message):
        tiny.decode(**{"z": torch.zeros(1, 4, 8, 8), **kwargs})


def test_bad_decoder_arguments(tiny):
    x, t, z = torch.zeros(2, 3, 32, 32), torch.ones(2), torch.zeros(2, 4, 4, 4)
    for args, message in [
        ((x, t, None), "z must be a torch.Tensor .*no null context"),
        ((x[..., :28], t, z), r"x_t must be \(B, 3, H, W\), sides multiples of 8, got \(2, 3, 32, 28\)"),
        ((x, t[:1], z), r"t must be \(2,\), one time per image, got \(1,\)"),
        ((x, t, z[..., :3]), r"z must be \(2, 4, 4, 4\), got \(2, 4, 4, 3\)"),
    ]:
        with pytest.raises(InputError, match=message):
            tiny.decoder(*args)


def test_msdd_file_is_declined(tmp_path):
    save_file(Tokenizer.from_config("tiny").state_dict(), tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"m\.safetensors: not an SSDD tokenizer"):
        imported(tmp_path / "m.safetensors")
