"""batch_invariant=True: the bits of an image depend on its latents and its seed, not on the batch."""

import pytest
import torch

from msdd_fast import Tokenizer, accelerate
from msdd_fast.errors import InputError
from tests.engine.test_parity import latents
from tests.perturbed import perturbed

SEEDS = [3, 4, 5, 6, 7]


def check(fast, z, **options):
    """Whole, alone, shuffled, in parts; a decode that differs at another place of the batch would show."""
    whole = fast.decode(z, SEEDS, **options)
    alone = torch.cat([fast.decode(z[i : i + 1], SEEDS[i], **options) for i in range(5)])
    shuffled = fast.decode(z.flip(0), SEEDS[::-1], **options).flip(0)
    parts = torch.cat([fast.decode(z[:3], SEEDS[:3], **options), fast.decode(z[3:], SEEDS[3:], **options)])
    many = torch.cat(list(fast.decode_many([z[:2], z[2:]], 3, **options)))
    for other in (alone, shuffled, parts, many):
        assert torch.equal(whole, other)


def check_stream(fast, z):
    whole = list(fast.stream(z, SEEDS))
    for i in (0, 4):
        for a, b in zip(fast.stream(z[i : i + 1], SEEDS[i]), whole, strict=True):
            assert a.stage == b.stage and torch.equal(a.images[0], b.images[i]) and torch.equal(a.state[0], b.state[i])


@pytest.mark.parametrize("native", ["0", "1"])
@pytest.mark.parametrize("bf16", ["0", "1"])
def test_every_conditioning(tok, bf16, native, monkeypatch):
    monkeypatch.setenv("MSDD_FAST_CPU_BF16", bf16)
    monkeypatch.setenv("MSDD_FAST_NATIVE_LINEAR", native)
    fast, z = accelerate(tok, batch_invariant=True), latents(tok, 5)
    assert fast.batch_sizes == (1,) and "images run one at a time" in str(fast.report())
    check(fast, z)
    check(fast, z, cfg_scale=1.7, out_dtype=torch.uint8)
    check_stream(fast, z)


def test_the_other_family():
    tok = perturbed("tiny-ssdd")
    fast = accelerate(tok, dtype=torch.float32, batch_invariant=True, steps=2)
    z = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    check(fast, z)
    check_stream(fast, z)


def test_the_bundled_model():
    tok = Tokenizer.from_pretrained("msdd-nano")
    check(accelerate(tok, batch_invariant=True), latents(tok, 5))


def test_the_fast_tier(cross):
    fast = accelerate(cross, dtype=torch.float32, tier="fast", max_psnr_loss=100.0, batch_invariant=True)
    check(fast, latents(cross, 5))


def test_arguments(cross):
    assert accelerate(cross, batch_invariant=True, batch_sizes=1).batch_invariant
    with pytest.raises(InputError, match=r"^batch_sizes must be None or 1 with batch_invariant=True, got \(1, 8\)"):
        accelerate(cross, batch_invariant=True, batch_sizes=(1, 8))
    with pytest.raises(InputError, match=r"^batch_invariant must be True or False, got 1"):
        accelerate(cross, batch_invariant=1)
