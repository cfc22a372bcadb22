"""Arithmetic of a training step."""

import pytest
import torch
import torch.nn.functional as F

from msdd_fast.training.loop.config import LoopConfig
from msdd_fast.training.loop.precision import autocast, plain_attention
from tests.training.loop.test_trainer import trainer

BF16 = LoopConfig(device="cpu", precision="bfloat16")


def attention_gradients(*qkv):
    q, k, v = (x.detach().clone().requires_grad_() for x in qkv)
    out = F.scaled_dot_product_attention(q, k, v)
    return out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))


def test_autocast():
    x, w = torch.randn(4, 8), torch.randn(8, 8)
    with autocast(BF16):
        assert (x @ w).dtype == torch.bfloat16
    with autocast(LoopConfig(device="cpu", precision="float32")):
        assert (x @ w).dtype == torch.float32


def test_attention_by_products_is_attention():
    generator = torch.Generator().manual_seed(0)
    qkv = [torch.randn(2, 4, n, 32, generator=generator).bfloat16() for n in (48, 80, 80)]
    exact = attention_gradients(*(x.float() for x in qkv))
    flash = attention_gradients(*qkv)
    with plain_attention(BF16):
        plain = attention_gradients(*qkv)
    assert any(not torch.equal(a, b) for a, b in zip(plain, flash, strict=True))  # another kernel
    for a, reference in zip(plain, exact, strict=True):  # scores are rounded once more than in flash attention
        assert (a - reference).norm() < 0.02 * reference.norm()


def test_settings_are_given_back():
    allowed = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed
    before = allowed(), torch.backends.cuda.flash_sdp_enabled()
    with pytest.raises(ZeroDivisionError), plain_attention(BF16):
        assert (allowed(), torch.backends.cuda.flash_sdp_enabled()) == (True, False)
        raise ZeroDivisionError
    assert (allowed(), torch.backends.cuda.flash_sdp_enabled()) == before
    with plain_attention(LoopConfig(device="cpu", precision="float32")):
        assert (allowed(), torch.backends.cuda.flash_sdp_enabled()) == before


def test_recomputed_blocks(images, tmp_path):
    """The backward pass recomputes with the same attention as the forward pass."""
    weights = []
    for recompute in (False, True):
        run = trainer(images, tmp_path / str(recompute), 2, precision="bfloat16", activation_checkpointing=recompute)
        weights.append(run.run().state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
