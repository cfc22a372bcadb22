"""The eager model without fixtures: its parts against plain formulas in float64, sizes, gradients, arguments."""

import math
from dataclasses import replace

import pytest
import torch

from msdd_fast import Tokenizer
from msdd_fast.diffusion.config import num_parameters
from msdd_fast.errors import ConfigError, InputError
from msdd_fast.families.pid.blocks import RMSNorm
from msdd_fast.families.pid.config import PiDConfig, swiglu_hidden_size
from msdd_fast.families.pid.decoder import (
    PiDDecoder,
    SigmaGate,
    from_pixels,
    pixel_positions,
    time_features,
    to_patches,
)
from msdd_fast.families.pid.presets import PID_PRESETS
from msdd_fast.families.pid.rope import image_rope, text_rope
from tests.families.pid.models import TINY, captions, latents, random_tokenizer

# Of every released file, counted from its shapes.
PARAMETERS = {
    "pid-flux": 1_362_348_170,
    "pid-sd3": 1_362_348_170,
    "pid-sdxl": 1_362_292_874,
    "pid-flux2": 1_362_864_266,
    "pid-dinov2": 1_365_813_386,
    "pid-siglip": 1_367_582_858,
    "pid-v15-flux": 1_400_199_315,
    "pid-v15-qwenimage": 1_400_199_315,
    "pid-v15-flux2": 1_400_346_771,
    "pid-v15-flux2-undistilled": 1_400_346_771,
}


@pytest.fixture(scope="module")
def tok():
    return random_tokenizer()


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_of_released_sizes(name):
    with torch.device("meta"):
        decoder = PiDDecoder(PID_PRESETS[name])
    assert sum(p.numel() for p in decoder.parameters()) == PARAMETERS[name] == num_parameters(decoder.config)


def test_the_hidden_size_is_that_of_the_specification():
    assert all(swiglu_hidden_size(n) == int(2 * int(4 * n) / 3) for n in range(1, 2**16 + 1))
    assert swiglu_hidden_size(1536) == 4096


def test_parameters_of_other_sizes():
    for changes in ({}, {"gate": "channel"}, {"pixel_injection": False, "interval": 3, "blocks": 0}):
        config = replace(TINY, features=replace(TINY.features, **changes))
        assert sum(p.numel() for p in PiDDecoder(config).parameters()) == config.num_parameters


def test_a_patch_is_a_channel_row_column():
    x = torch.arange(2 * 3 * 8 * 12).view(2, 3, 8, 12)
    patches = to_patches(x, 4)
    assert patches.shape == (2, 6, 3, 4, 4) and torch.equal(patches[1, 5], x[1, :, 4:8, 8:12])
    assert torch.equal(from_pixels(patches.flatten(3).transpose(2, 3), (2, 3), 4), x)


def test_the_norm_divides_by_the_root_mean_square():
    norm, x = RMSNorm(8).double(), latents(3, 8).double() * 1e-3
    with torch.no_grad():
        norm.weight.copy_(latents(8, seed=1))
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)


def test_positions_and_times():
    column = pixel_positions(50, 8, torch.device("cpu"))
    assert column.dtype == torch.float64
    assert column[49, 1] == pytest.approx(math.sin(49 * 10000**-0.25)) and column[49, 6] == pytest.approx(
        math.cos(49 * 10000**-0.5)
    )
    features = time_features(torch.tensor([0.634]))
    assert features[0, 3] == pytest.approx(math.cos(634 * 10 ** (-3 / 128)), abs=1e-4)
    assert features[0, 128 + 3] == pytest.approx(math.sin(634 * 10 ** (-3 / 128)), abs=1e-4)


def test_rope_alternates_columns_and_rows():
    config = replace(TINY.decoder, rope_reference=(32, 64))  # 2 x 4 patches
    cpu = torch.device("cpu")
    table, text = image_rope(config, (4, 6), 16, cpu), text_rope(5, 16, cpu)
    token, i, k = 2 * 6 + 5, 1, 8 / 6
    x, y = 16.0, 16 * 2 / 3
    assert table.cos.shape == (24, 8)
    for axis, (position, base) in enumerate(((x, 10000 * 1.5**k), (y, 10000 * 2.0**k))):
        assert table.cos[token, 2 * i + axis] == pytest.approx(math.cos(position * base ** (-4 * i / 16)), abs=1e-5)
        assert table.sin[token, 2 * i + axis] == pytest.approx(math.sin(position * base ** (-4 * i / 16)), abs=1e-5)
    assert text.sin[4, 3] == pytest.approx(math.sin(4 * 10000 ** (-6 / 16)), abs=1e-6)
    plain = image_rope(replace(config, rope="original"), (1, 1), 16, cpu)
    assert torch.equal(plain.cos, torch.ones(1, 8))  # a single row or column is at 0


@pytest.mark.parametrize("outputs", [1, 6])
def test_gates_close_as_latents_get_noisier(outputs):
    gate, s, features = SigmaGate(6, outputs), latents(2, 3, 6), latents(2, 3, 6, seed=1)
    with torch.no_grad():
        gate.content_proj.weight.copy_(latents(outputs, 12, seed=2))
        gate.content_proj.bias.fill_(2.0)
        out = gate(s, features, torch.tensor([0.0, 0.4]))
    logit = torch.cat([s, features], -1) @ gate.content_proj.weight.t() + 2
    g = torch.sigmoid(logit - torch.tensor([0.0, 5 * 0.4])[:, None, None])
    torch.testing.assert_close(out, s + g * features)


@torch.no_grad()
def test_images_of_a_batch_do_not_see_each_other(tok):
    z, text, x = latents(3, 4, 2, 3), captions(3), latents(3, 3, 64, 96, seed=1)
    t, sigma = torch.tensor([0.9, 0.5, 0.1]), torch.tensor([0.0, 0.5, 0.2])
    together = tok.decoder(x, t, z, text, sigma)
    for i in range(3):
        one = slice(i, i + 1)
        alone = tok.decoder(x[one], t[one], z[one], text[one], sigma[one])
        torch.testing.assert_close(together[one], alone, rtol=0, atol=1e-5)


@torch.no_grad()
def test_everything_given_matters(tok):
    z, text, x = latents(1, 4, 2, 2), captions(1), latents(1, 3, 64, 64, seed=1)
    t, sigma = torch.tensor([0.6]), torch.tensor([0.1])
    base = tok.decoder(x, t, z, text, sigma)
    mask = torch.ones(1, text.shape[1], dtype=torch.bool)
    assert torch.allclose(tok.decoder(x, t, z, text, sigma, mask), base, atol=1e-5)
    mask[:, 3:] = False
    others = (
        tok.decoder(x.flip(3), t, z, text, sigma),
        tok.decoder(x, t + 0.1, z, text, sigma),
        tok.decoder(x, t, z.flip(2), text, sigma),
        tok.decoder(x, t, z, text.flip(1), sigma),
        tok.decoder(x, t, z, text[:, :4], sigma),
        tok.decoder(x, t, z, text, sigma + 0.5),
        tok.decoder(x, t, z, text, sigma, mask),
    )
    assert all((o - base).abs().max() > 1e-3 for o in others)


def test_gradients_reach_every_weight_that_is_used():
    """Only the last block's caption stream is dead (docs/pid.md)."""
    tok = random_tokenizer(seed=3).train()
    x, z = latents(2, 3, 64, 64, seed=1), latents(2, 4, 2, 2)
    tok.decoder(x, torch.tensor([0.9, 0.2]), z, captions(2), torch.tensor([0.1, 0.3])).square().mean().backward()
    last = f"patch_blocks.{TINY.decoder.depth - 1}."
    dead = {last + n for n in ("norm_y2.weight", "attn.q_norm_y.weight", "attn.proj_y.weight", "attn.proj_y.bias")}
    dead |= {f"{last}mlp_y.w{i}.weight" for i in (1, 2, 3)}
    for name, p in tok.decoder.named_parameters():
        alive = p.grad is not None and bool(p.grad.abs().sum() > 0)
        assert alive == (name not in dead), name


def test_an_untrained_network_predicts_nothing():
    """As it begins, the output is zero, and the gates are almost open."""
    tok = Tokenizer.from_config(TINY)
    v = tok.decoder(latents(1, 3, 64, 64), torch.tensor([0.5]), latents(1, 4, 2, 2), captions(1))
    assert torch.equal(v, torch.zeros_like(v))
    gate = tok.decoder.lq_proj.gate_modules[0].requires_grad_(False)
    assert float(torch.sigmoid(gate.content_proj.bias[0])) == pytest.approx(0.88, abs=0.01)
    assert float(gate.log_alpha) == pytest.approx(math.log(5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_t": latents(1, 3, 60, 64)}, "x_t must be .* sides multiples of 16"),
        ({"t": torch.ones(2)}, r"t must be \(1,\)"),
        ({"z": None}, "PiD has no null latents"),
        ({"z": latents(1, 5, 2, 2)}, r"z must be \(1, 4, h, w\)"),
        ({"text": None}, r"text must be \(1, T, 24\)"),
        ({"text": latents(1, 3, 25)}, r"text must be \(1, T, 24\)"),
        ({"sigma": torch.ones(2)}, r"sigma must be \(1,\)"),
    ],
)
def test_wrong_shapes(tok, change, message):
    given = {"x_t": latents(1, 3, 64, 64), "t": torch.ones(1), "z": latents(1, 4, 2, 2), "text": captions(1), **change}
    with pytest.raises(InputError, match=message):
        tok.decoder(**given)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PiDConfig(image_size=2000), "image_size must be a multiple of factor x upscale = 32"),
        (lambda: PiDConfig(upscale=2), "must cover more than one patch of 16 pixels, got 16"),
        (lambda: replace(TINY, sampling=replace(TINY.sampling, steps=5)), "sampling.steps must be at most 4"),
        (lambda: replace(TINY, sampling=replace(TINY.sampling, cfg_scale=2.0)), "sampling.cfg_scale must be 1"),
        (
            lambda: replace(TINY, features=replace(TINY.features, unpatchify=2)),
            "features.unpatchify must divide|one patch",
        ),
        (lambda: replace(TINY, decoder=replace(TINY.decoder, heads=3)), "decoder.hidden_size must be heads=3 times"),
        (lambda: PiDConfig.from_dict({"latents": "cosmos"}), "latents"),
    ],
)
def test_wrong_configs(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


def test_configs_survive_json():
    for config in PID_PRESETS.values():
        assert PiDConfig.from_dict(config.to_dict()) == config
