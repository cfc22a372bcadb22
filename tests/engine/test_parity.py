"""The exact tier is the eager sampler up to rounding."""

from dataclasses import replace

import pytest
import torch

from msdd_fast import Tokenizer, accelerate
from msdd_fast.backends import extension_status
from msdd_fast.diffusion.config import ScheduleConfig
from msdd_fast.families import get_preset
from tests.conftest import HAS_GPU
from tests.perturbed import perturbed
from tests.reference import noted_backends, reference

# float32: eager and engine differ in the order of sums only. Decoded values reach 4; the largest difference seen is
# 1.4e-5 (guidance doubles a velocity's error, four steps add it up).
FLOAT32 = 5e-5


def latents(tok, batch, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tok.config.num_latent_tokens, tok.config.latent_dim, generator=generator)


@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
@pytest.mark.parametrize("steps", [1, 4])
def test_float32(tok, on_device, steps, cfg_scale):
    tok, z = on_device(tok), on_device(latents(tok, 5))
    engine = accelerate(tok, dtype=torch.float32, steps=steps, cfg_scale=cfg_scale, batch_sizes=(2,))
    expected = reference(tok, z, 7, steps, cfg_scale)
    assert (engine.decode(z, 7) - expected).abs().max() < FLOAT32
    assert (engine.decode(z[3:4], 10) - expected[3:4]).abs().max() < FLOAT32
    sizes = [tok.config.stage_resolution(s) for s in range(tok.config.schedule.num_stages)]
    noise = [on_device(torch.randn(5, 3, r, r, generator=torch.Generator().manual_seed(r))) for r in sizes]
    given = engine.decode(z, noise=noise)
    assert (given - reference(tok, z, noise=noise, steps=steps, cfg_scale=cfg_scale)).abs().max() < FLOAT32
    assert (given - expected).abs().max() > 0.1  # the noise matters


@pytest.mark.parametrize("backend", ["eager", "cpu", "triton"])
@pytest.mark.parametrize("conditioning", ["cross", "joint"])
def test_every_backend(conditioning, backend, monkeypatch):
    """Two small scales: Triton's interpreter, where there is no GPU, takes milliseconds for every program of a grid."""
    if backend == "cpu" and not extension_status()[0]:
        pytest.skip(extension_status()[1])
    tiny = get_preset("tiny")
    config = replace(
        tiny,
        image_size=16,
        schedule=ScheduleConfig(num_stages=2),
        decoder=replace(tiny.decoder, conditioning=conditioning, head_dim=64, depth=2),
    )
    device = "cuda" if backend == "triton" and HAS_GPU else "cpu"
    tok = perturbed(config).to(device)
    z = latents(tok, 1).to(device)
    choice = f"{backend},context_attention=auto"  # Triton has that one in 16 bits only
    graphs = "auto" if backend == "cpu" else False  # others are refused after a decode in vain
    engine = accelerate(tok, dtype=torch.float32, backend=choice, cfg_scale=1.5, graphs=graphs)
    expected, taken = reference(tok, z, 3, cfg_scale=1.5), noted_backends(monkeypatch)
    assert (engine.decode(z, 3) - expected).abs().max() < FLOAT32
    assert all(taken[op] == {backend} for op in ("norm_modulate", "qk_norm_rope", "swiglu", "stage_transition"))


@pytest.mark.parametrize("dtype", [torch.bfloat16])
@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
def test_bfloat16_errs_no_more_than_eager(tok, on_device, dtype, cfg_scale, monkeypatch):
    monkeypatch.setenv("MSDD_FAST_CPU_BF16", "1")
    tok, z = on_device(tok), on_device(latents(tok, 4))
    exact = reference(tok, z, 7, 2, cfg_scale)
    low = on_device(Tokenizer.from_config(tok.config)).to(dtype)
    low.load_state_dict(tok.state_dict())
    eager = reference(low, z.to(dtype), 7, 2, cfg_scale).float()
    engine = accelerate(low, dtype=dtype, steps=2, cfg_scale=cfg_scale)
    assert engine.dtype == dtype
    error = (engine.decode(z, 7) - exact).square().mean().sqrt()
    assert error <= 2 * (eager - exact).square().mean().sqrt()
    assert error > 1e-4  # it really calculates in bfloat16


@pytest.mark.parametrize("batch", [1, 9, pytest.param(65, marks=pytest.mark.slow)])  # 65 parts of a GPU's sizes
def test_nano(batch, on_device):
    tok = on_device(Tokenizer.from_pretrained("msdd-nano"))
    z = on_device(latents(tok, batch))
    engine = accelerate(tok, dtype=torch.float32)
    assert (engine.decode(z, 1) - reference(tok, z, 1)).abs().max() < FLOAT32
    as_bytes = engine.decode(z, 1, out_dtype=torch.uint8)
    assert as_bytes.dtype == torch.uint8 and as_bytes.shape == (batch, 3, 128, 128)


def test_training_the_tokenizer_later_does_not_change_the_engine(cross):
    tok = Tokenizer.from_config(cross.config)
    tok.load_state_dict(cross.state_dict())
    engine = accelerate(tok, dtype=torch.float32)
    z = latents(tok, 1)
    before = engine.decode(z)
    with torch.no_grad():
        for p in tok.parameters():
            p.zero_()
    assert torch.equal(engine.decode(z), before)
