"""Checkpoints of the authors' code: what is read, what is dropped, and what is refused."""

import argparse
import os

import pytest
import torch
from safetensors import safe_open

import msdd_fast
from msdd_fast.errors import CheckpointError, InputError
from msdd_fast.families.msdd.config import DecoderConfig, EncoderConfig, RopeConfig
from msdd_fast.families.msdd.released import translate_authors

WIDTH, HEAD_DIM, TOKENS, LATENT, DEPTH = 64, 32, 16, 32, 2
MLP = 256  # int(8/3 * 64) rounded up to a multiple of 256


def authors_state(seed=0):
    """Random tensors of a small tokenizer under the authors' names (docs/spec.md#authors-checkpoint)."""
    generator = torch.Generator().manual_seed(seed)
    state = {}

    def add(name, *shape):
        state[name] = 0.1 * torch.randn(shape, generator=generator)

    def linear(name, n_in, n_out):
        add(f"{name}.weight", n_out, n_in)
        add(f"{name}.bias", n_out)

    def norm(name, size):
        linear(name, 1, size)
        state[f"{name}.weight"] = 1 + state[f"{name}.weight"][:, 0]

    add("encoder.register", 1, TOKENS, WIDTH)
    add("decoder.context_null", 1, TOKENS, LATENT)
    for side in ("encoder", "decoder"):
        add(f"{side}.x_embedder.proj.weight", WIDTH, 3, 8, 8)
        add(f"{side}.x_embedder.proj.bias", WIDTH)
        linear(f"{side}.t_embedder.mlp.0", 256, WIDTH)
        linear(f"{side}.t_embedder.mlp.2", WIDTH, WIDTH)
        linear(f"{side}.context_embedder", LATENT, WIDTH)
        for i in range(DEPTH):
            for stream in ("context_block", "x_block"):
                block = f"{side}.joint_blocks.{i}.{stream}"
                dead = side == "decoder" and stream == "context_block" and i == DEPTH - 1
                linear(f"{block}.attn.qkv", WIDTH, 3 * WIDTH)
                norm(f"{block}.attn.ln_q", HEAD_DIM)
                norm(f"{block}.attn.ln_k", HEAD_DIM)
                if side == "decoder":
                    linear(f"{block}.adaLN_modulation.1", WIDTH, (2 if dead else 6) * WIDTH)
                else:
                    norm(f"{block}.norm1", WIDTH)
                    norm(f"{block}.norm2", WIDTH)
                    state[f"{block}.shift"] = torch.zeros(1, WIDTH)
                    state[f"{block}.scale"] = torch.zeros(1, WIDTH)
                if not dead:
                    linear(f"{block}.attn.proj", WIDTH, WIDTH)
                    for w in ("w1", "w3"):
                        add(f"{block}.mlp.{w}.weight", MLP, WIDTH)
                    add(f"{block}.mlp.w2.weight", WIDTH, MLP)
    linear("encoder.final_layer.linear", WIDTH, LATENT)
    state["encoder.final_layer.shift"] = torch.zeros(1, WIDTH)
    state["encoder.final_layer.scale"] = torch.zeros(1, WIDTH)
    for part in ("linear.weight", "linear.bias", "shift", "scale"):
        state[f"quant_conv.{part}"] = state[f"encoder.final_layer.{part}"]
    linear("decoder.final_layer.linear", WIDTH, 3 * 8 * 8)
    linear("decoder.final_layer.adaLN_modulation.1", WIDTH, 2 * WIDTH)
    return state


UNUSED = sorted(
    [f"encoder.t_embedder.mlp.{i}.{p}" for i in (0, 2) for p in ("weight", "bias")]
    + [f"encoder.context_embedder.{p}" for p in ("weight", "bias")]
    + [
        f"encoder.joint_blocks.{i}.{s}.{p}"
        for i in range(DEPTH)
        for s in ("context_block", "x_block")
        for p in ("shift", "scale")
    ]
    + [f"{layer}.{p}" for layer in ("encoder.final_layer", "quant_conv") for p in ("shift", "scale")]
    # The image stream of the encoder's last block: only keys and values are read.
    + [f"encoder.joint_blocks.1.x_block.attn.qkv.{p}[:64]" for p in ("weight", "bias")]
    + [
        f"encoder.joint_blocks.1.x_block.{m}.{p}"
        for m in ("attn.ln_q", "attn.proj", "norm2")
        for p in ("weight", "bias")
    ]
    + [f"encoder.joint_blocks.1.x_block.mlp.{w}.weight" for w in ("w1", "w2", "w3")]
    # The context stream of the decoder's last block.
    + [f"decoder.joint_blocks.1.context_block.attn.qkv.{p}[:64]" for p in ("weight", "bias")]
    + [f"decoder.joint_blocks.1.context_block.attn.ln_q.{p}" for p in ("weight", "bias")]
)


def load(source, **kwargs):
    return msdd_fast.Tokenizer.from_authors_checkpoint(source, **{"image_size": 64, "num_stages": 3, **kwargs})


@pytest.fixture
def state():
    return authors_state()


@pytest.fixture
def full():
    """A whole checkpoint with two different sets of weights."""
    return {
        "model": authors_state(0),
        "ema": authors_state(1),
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.95)}]},
        "steps": 3,
        "args": argparse.Namespace(lr=1e-4, name="run", gammas=[1 / 3, None], nested=argparse.Namespace(a=True)),
    }


def save(data, path):
    torch.save(data, path)
    return path


def assert_same(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def assert_differ(a, b):
    assert not torch.equal(a.decoder.context_null, b.decoder.context_null)


# --- what is read


def test_config_is_inferred(state):
    tok = load(state)
    cfg = tok.config
    assert (cfg.image_size, cfg.patch_size, cfg.num_latent_tokens, cfg.latent_dim) == (64, 8, TOKENS, LATENT)
    assert cfg.encoder == EncoderConfig(DEPTH, WIDTH, HEAD_DIM, 256, register_std=1.0, latent_norm=False)
    assert cfg.decoder == DecoderConfig(DEPTH, WIDTH, HEAD_DIM, 256, conditioning="joint")
    assert cfg.rope == RopeConfig(image_rope="cosine", image_positions="centered", context_positions="row")
    assert (cfg.schedule.num_stages, cfg.schedule.block_correlation, cfg.schedule.time_grid) == (3, 1 / 3, "authors")
    assert not tok.training
    x = tok.decode(tok.encode(torch.zeros(1, 3, 64, 64)))
    assert x.shape == (1, 3, 64, 64) and x.isfinite().all()


def test_every_tensor_is_used_or_listed(state):
    _, tensors, unused = translate_authors(state, "ema", 64, 3)
    assert unused == UNUSED
    used = sum(t.numel() for t in tensors.values())
    assert used == sum(p.numel() for p in load(state).parameters())
    row = {"weight": WIDTH * WIDTH, "bias": WIDTH}
    dropped = sum(row[n.split(".")[-1][:-5]] if n.endswith("[:64]") else state[n].numel() for n in unused)
    alias = state["quant_conv.linear.weight"].numel() + state["quant_conv.linear.bias"].numel()
    assert used + dropped + alias == sum(t.numel() for t in state.values())


def test_tensors_land_in_their_places(state):
    """Spot checks where a slip would keep the shapes."""
    ours = load(state).state_dict()
    pairs = {
        "encoder.blocks.0.image.mlp.w3.weight": "encoder.joint_blocks.0.x_block.mlp.w3.weight",
        "encoder.blocks.0.context.norm2.bias": "encoder.joint_blocks.0.context_block.norm2.bias",
        "encoder.blocks.1.context.q_norm.weight": "encoder.joint_blocks.1.context_block.attn.ln_q.weight",
        "encoder.head.weight": "quant_conv.linear.weight",
        "decoder.blocks.1.image.proj.weight": "decoder.joint_blocks.1.x_block.attn.proj.weight",
        "decoder.blocks.1.context.adaln.linear.bias": "decoder.joint_blocks.1.context_block.adaLN_modulation.1.bias",
        "decoder.time_embed.mlp.2.weight": "decoder.t_embedder.mlp.2.weight",
    }
    for name, original in pairs.items():
        assert torch.equal(ours[name], state[original]), name
    kv = state["decoder.joint_blocks.1.context_block.attn.qkv.weight"][WIDTH:]
    assert torch.equal(ours["decoder.blocks.1.context.kv.weight"], kv)


def test_full_checkpoint(full, tmp_path):
    path = save(full, tmp_path / "0000003.pt")
    ema, model = load(path), load(str(path), weights="model")
    assert_same(ema, load(full["ema"]))
    assert_same(model, load(full["model"]))
    assert_same(model, load(full, weights="model"))
    assert_differ(ema, model)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes(state, prefix):
    assert_same(load({prefix + name: t for name, t in state.items()}), load(state))


def test_lower_precision_is_widened(state):
    tok = load({name: t.bfloat16() for name, t in state.items()})
    assert {p.dtype for p in tok.parameters()} == {torch.float32}
    assert torch.equal(tok.decoder.context_null, state["decoder.context_null"].bfloat16().float())


def test_memory_is_not_shared_with_the_caller(state):
    before = {name: t.clone() for name, t in state.items()}
    tok = load(state)
    with torch.no_grad():
        for p in tok.parameters():
            p.add_(1)
    assert all(torch.equal(state[name], before[name]) for name in state)


def test_import_survives_saving(state, tmp_path):
    tok = load(state)
    tok.save_pretrained(tmp_path / "ckpt")
    assert_same(msdd_fast.Tokenizer.from_pretrained(tmp_path / "ckpt"), tok)


@pytest.mark.parametrize("stages", [3, 4])
def test_reference_files(shared_dir, tmp_path, stages):
    """The authors' own names and shapes, bare and as a .pt file."""
    with safe_open(shared_dir / "fixtures" / f"authors_d2_64px_{stages}stage.safetensors", framework="pt") as f:
        state = {k.removeprefix("model."): f.get_tensor(k) for k in f.keys() if k.startswith("model.")}  # noqa: SIM118
    _, _, unused = translate_authors(state, "ema", 64, stages)
    assert unused == sorted(name.replace("[:64]", "[:128]") for name in UNUSED)
    assert set(state) == set(authors_state())
    tok = load(state, num_stages=stages)
    assert (tok.config.decoder.hidden_size, tok.config.decoder.head_dim, tok.config.schedule.num_stages) == (
        128,
        64,
        stages,
    )
    other = {name: t + 1 if name == "decoder.context_null" else t for name, t in state.items()}
    path = save({"model": other, "ema": state, "steps": 1, "args": argparse.Namespace(lr=1.0)}, tmp_path / "a.pt")
    assert_same(load(path, num_stages=stages), tok)
    assert_differ(load(path, num_stages=stages, weights="model"), tok)


# --- what is refused


def test_which_weights(full, state):
    del full["ema"]
    with pytest.raises(CheckpointError, match="state dict: no 'ema' weights in the checkpoint; try weights='model'"):
        load(full)
    with pytest.raises(CheckpointError, match="no 'ema' weights"):
        load({"model": state, "ema": None})
    with pytest.raises(CheckpointError, match="no 'model' weights in the checkpoint; try weights='ema'"):
        load({"ema": state}, weights="model")
    with pytest.raises(InputError, match="weights must be 'ema' or 'model', got 'best'"):
        load(state, weights="best")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([torch.zeros(2)], "must hold a dict, got list"),
        (torch.zeros(2), "must hold a dict, got Tensor"),
        ({}, "not a state dict"),
        ({"state_dict": {"a": torch.zeros(1)}, "epoch": 3}, "not a state dict: expected names mapped to tensors"),
        ({0: torch.zeros(1)}, "not a state dict"),
        (
            {"conv1.weight": torch.zeros(64, 3, 7, 7), "fc.bias": torch.zeros(10)},
            "not an MSDD tokenizer: .* is missing",
        ),
    ],
)
def test_foreign_files(data, message, tmp_path):
    path = save(data, tmp_path / "foreign.pt")
    with pytest.raises(CheckpointError, match=rf"foreign\.pt.*{message}"):
        load(path)


class Trap:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_file_is_run(full, tmp_path, zipped):
    full["args"] = Trap(tmp_path / "pwned")
    path = tmp_path / "trap.pt"
    torch.save(full, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"trap\.pt refused: it holds \w+\.system, and may hold only tensors"):
        load(path)
    assert not (tmp_path / "pwned").exists()
    torch.load(path, weights_only=False)  # the trap does work
    assert (tmp_path / "pwned").exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, -1])
def test_truncated_files(state, tmp_path, keep, zipped, recwarn):
    path = tmp_path / "cut.pt"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError, match=r"cut\.pt is damaged or not a PyTorch file"):
        load(path)
    assert not recwarn.list


@pytest.mark.parametrize("content", [b"hello world", b"\x80\x04K\x01.", b"\x89PNG\r\n\x1a\n"])
def test_not_pytorch(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.pt is damaged or not a PyTorch file|must hold a dict"):
        load(tmp_path / "x.pt")


def test_missing_file(tmp_path):
    for path in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(CheckpointError, match="is not a file"):
            load(path)


@pytest.mark.parametrize(
    "name", ["encoder.joint_blocks.0.x_block.shift", "encoder.joint_blocks.1.context_block.scale", "quant_conv.shift"]
)
def test_encoder_modulation_must_be_zero(state, name):
    state[name] = torch.zeros(1, WIDTH).index_fill_(1, torch.tensor([5]), 0.1)
    with pytest.raises(CheckpointError, match=f"{name} must be zero"):
        load(state)


def test_alias_must_agree(state):
    state["quant_conv.linear.bias"] = state["quant_conv.linear.bias"] + 1
    with pytest.raises(
        CheckpointError, match=r"quant_conv must equal .*final_layer, but quant_conv\.linear\.bias differs"
    ):
        load(state)


@pytest.mark.parametrize("kept", ["quant_conv", "encoder.final_layer"])
def test_one_of_the_aliases_is_enough(state, kept):
    expected = load(state)
    for name in [n for n in state if n.startswith(("quant_conv", "encoder.final_layer")) and not n.startswith(kept)]:
        del state[name]
    assert_same(load(state), expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("encoder.register", r"tensor encoder\.register is missing"),
        ("decoder.joint_blocks.0.context_block.attn.ln_k.weight", r"0\.context_block\.attn\.ln_k\.weight is missing"),
        ("decoder.joint_blocks.1.x_block.attn.proj.bias", r"missing decoder\.blocks\.1\.image\.proj\.bias \(64,\)"),
    ],
)
def test_missing_tensor(state, name, message):
    del state[name]
    with pytest.raises(CheckpointError, match=message):
        load(state)


def test_missing_block(state):
    for name in [n for n in state if n.startswith("decoder.joint_blocks.0.")]:
        del state[name]
    with pytest.raises(CheckpointError, match=r"decoder\.joint_blocks are missing or not numbered from 0"):
        load(state)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (
            "decoder.final_layer.linear.weight",
            (192, 65),
            r"the config asks for \(192, 64\), the weights have \(192, 65\)",
        ),
        ("encoder.register", (16, 64), r"tensor encoder\.register must have 3 dimensions, got \(16, 64\)"),
        (
            "encoder.joint_blocks.0.context_block.mlp.w1.weight",
            (170, 64),
            "encoder: MLP width 170 is not the authors' rule",
        ),
        ("encoder.joint_blocks.1.x_block.attn.qkv.weight", (), "unexpected encoder"),
        ("encoder.joint_blocks.1.x_block.attn.qkv.bias", (3, 2), r"the weights have \(2, 2\)"),
        ("decoder.joint_blocks.0.context_block.attn.ln_k.weight", (30,), "head_dim a multiple of 4"),
        ("decoder.extra.weight", (2,), r"unexpected decoder\.extra\.weight \(2,\)"),
    ],
)
def test_wrong_shape(state, name, shape, message):
    state[name] = torch.zeros(shape)
    with pytest.raises(CheckpointError, match=message):
        load(state)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(image_size=100), "image_size must be a multiple of patch_size .* = 32 .* got 100"),
        (dict(image_size=0), "image_size must be at least 1, got 0"),
        (dict(num_stages=0), "num_stages must be 1 to 10, got 0"),
        (dict(num_stages=5), "image_size must be a multiple of .* = 128 .* got 64"),
    ],
)
def test_impossible_sizes(state, kwargs, message):
    with pytest.raises(CheckpointError, match=message):
        load(state, **kwargs)
