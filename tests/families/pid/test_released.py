"""Released files: names and shapes, prefixes, variants, one clear error for whatever does not fit."""

import ast

import pytest
import torch

from msdd_fast import Tokenizer
from msdd_fast.errors import CheckpointError, InputError
from msdd_fast.families.pid.decoder import PiDDecoder
from msdd_fast.families.pid.presets import PID_PRESETS
from msdd_fast.families.pid.released import VARIANTS, translate
from tests.families.pid.models import TINY, captions, latents, random_tokenizer

LISTS = {"pid_keys_2k": "flux", "pid_keys_v15_flux": "v15-flux", "pid_keys_v15_flux2": "v15-flux2"}


@pytest.fixture(scope="module")
def tok():
    return random_tokenizer()


@pytest.fixture
def state(tok):
    """As the authors' code would save it."""
    return {f"net.{n}": p.clone().bfloat16() for n, p in tok.decoder.state_dict().items()}


@pytest.mark.parametrize("file", LISTS)
def test_names_and_shapes_of_released_files(file, shared_dir):
    lines = (shared_dir / "fixtures" / f"{file}.txt").read_text().splitlines()
    listed = dict(line.split(" ", 1) for line in lines if line and not line.startswith("#"))
    with torch.device("meta"):
        decoder = PiDDecoder(VARIANTS[LISTS[file]])
    mine = {f"net.{n}": tuple(t.shape) for n, t in decoder.state_dict().items()}
    assert mine == {n: ast.literal_eval(shape) for n, shape in listed.items()}


def test_there_and_back(tok, state, tmp_path):
    loaded = Tokenizer.from_pid_checkpoint(state, variant=TINY)
    assert loaded.dtype == torch.float32 and loaded.config == TINY and not loaded.training
    loaded.export_released(tmp_path / "theirs.safetensors")
    again = Tokenizer.from_pid_checkpoint(tmp_path / "theirs.safetensors", variant=TINY)
    torch.save(state, tmp_path / "theirs.pth")
    third = Tokenizer.from_pid_checkpoint(tmp_path / "theirs.pth", variant=TINY)
    for name, p in loaded.state_dict().items():
        assert torch.equal(p, state[name.replace("decoder.", "net.")].float())
        assert torch.equal(p, again.state_dict()[name]) and torch.equal(p, third.state_dict()[name])


def test_our_own_format(tok, tmp_path):
    tok.save_pretrained(tmp_path / "ours")
    loaded = Tokenizer.from_pretrained(tmp_path / "ours")
    z, text = latents(1, 4, 2, 2), captions(1)
    assert loaded.config == TINY
    torch.testing.assert_close(
        loaded.decode(z, steps=1, text=text), tok.decode(z, steps=1, text=text), rtol=0, atol=1e-5
    )


def test_prefixes(state):
    """Bare names, parallel and compiled models, and full training checkpoints, of which the average is taken."""
    bare = {n.removeprefix("net."): t for n, t in state.items()}
    wrapped = {f"module.{n}": t for n, t in state.items()}
    zeros = {n: torch.zeros_like(t) for n, t in state.items()}
    average = {n.replace("net.", "net_ema.", 1): t for n, t in state.items()}
    others = {"repa_loss.weight": torch.ones(2), "fake_score.net.x": torch.ones(2), "discriminator.x": torch.ones(2)}
    head = {"net_ema.lq_proj.lq_aux_rgb_head.0.weight": torch.ones(16)}
    for given in (bare, wrapped, {**zeros, **average, **others, **head}):
        _, tensors, unused = translate(given, TINY)
        assert set(tensors) == {f"decoder.{n}" for n in bare}
        assert all(torch.equal(tensors[f"decoder.{n}"], t) for n, t in bare.items())
    assert set(unused) == {*zeros, *others, *head}


def shaped(width, channels):
    return {
        "net.lq_proj.latent_proj.0.weight": torch.zeros(width, channels, 3, 3),
        "net.patch_blocks.0.x": torch.ones(1),
    }


def test_variants_by_shape():
    for name, config in VARIANTS.items():
        channels = config.latent_channels // config.features.unpatchify**2
        first = shaped(config.features.width, channels)
        assert translate(first, name)[0] == config == PID_PRESETS[f"pid-{name}"]
        if channels == 16:
            with pytest.raises(
                InputError, match=r"variant must be named: .* is that of (flux and sd3|v15-flux and v15-q)"
            ):
                translate(first, "")
        else:
            assert translate(first, "")[0] == VARIANTS[name.removesuffix("-undistilled")]
        with pytest.raises(CheckpointError, match=r"not of the variant '.*': .* is that of"):
            translate(first, "sdxl" if name != "sdxl" else "flux")
    with pytest.raises(InputError, match=r"variant must be named: .* that of no released weights"):
        translate(shaped(16, 4), "")
    with pytest.raises(InputError, match=r"variant must be one of flux, sd3, .* got 'flux3'"):
        translate(shaped(512, 4), "flux3")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("net.final_layer.linear.bias"), r"missing decoder.final_layer.linear.bias \(3,\)"),
        (lambda s: s.update({"net.extra": torch.ones(2)}), r"unexpected decoder.extra \(2,\)"),
        (
            lambda s: s.update({"net.t_embedder.mlp.0.bias": torch.ones(5)}),
            r"decoder.t_embedder.mlp.0.bias: the config asks for \(32,\), the weights have \(5,\)",
        ),
        (lambda s: s.update({"net.final_layer.linear.bias": torch.full((3,), float("nan"))}), "has NaN or Inf"),
        (lambda s: s.update({"lq_proj.x": torch.ones(1)}), "unexpected decoder.lq_proj.x"),
        (lambda s: s.update({"net.x.weight_scale": torch.ones(1)}), "weights in 8 bits"),
        (lambda s: s.update({"core.x": torch.ones(1)}), "a PixelDiT checkpoint"),
        (lambda s: [s.pop(n) for n in list(s) if "lq_proj" in n], "no latent projection"),
        (lambda s: s.clear(), "not a state dict"),
        (lambda s: s.update({"module.net.final_layer.linear.bias": torch.ones(3)}), "is there twice"),
    ],
)
def test_one_error(state, change, message):
    change(state)
    with pytest.raises(CheckpointError, match=message) as caught:
        Tokenizer.from_pid_checkpoint(state, variant=TINY)
    assert len(str(caught.value)) < 400


def test_other_files(tmp_path):
    for content in ({}, [1], {"a": 1}, {"net.x": torch.ones(1)}):
        torch.save(content, tmp_path / "x.pth")
        with pytest.raises(CheckpointError):
            Tokenizer.from_pid_checkpoint(tmp_path / "x.pth", variant="flux")
    with pytest.raises(CheckpointError, match="is not a file"):
        Tokenizer.from_pid_checkpoint(tmp_path / "none.pth", variant="flux")
