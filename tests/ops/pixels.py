"""What the two halves of the pixel block are tested on."""

import pytest
import torch

from msdd_fast import native
from msdd_fast.errors import InputError
from tests.ops.adaln import randn

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (tokens, pixels, channels, features, hidden channels): one pixel, tails of every tile, more tokens than a tile holds,
# PiD's channels, channels that share no panel of the weight with their pixel, the largest.
SIZES = [
    (3, 4, 4, 16, 16),
    (1, 1, 8, 7, 32),
    (2, 9, 12, 20, 48),
    (5, 4, 16, 24, 64),
    (101, 5, 16, 33, 64),
    (2, 3, 20, 9, 13),
    (1, 2, 60, 5, 240),
    (2, 2, 64, 8, 256),
]
LEVELS = ["plain", "plain_bf16", "plain_amx", "avx2", "avx512", "avx512bf16", "amx"]


def packed_for(weight, level):
    """The weight packed for one level of the product; skips where this machine cannot run it."""
    try:
        return native.pack_linear(weight, False, level)
    except InputError as error:
        assert "run on this machine" in str(error)
        pytest.skip(f"this machine cannot run {level}")


def case(sizes, parts, device, dtype, pixel_dtype=None):
    """x, y, s, weight, bias, rms_weight, W1, b1, W2, b2: pixels in ``pixel_dtype``, all else in ``dtype``."""
    tokens, pixels, channels, features, hidden = sizes
    x, y = (randn(tokens, pixels, channels, seed=i).to(device, pixel_dtype or dtype) for i in range(2))
    s = randn(tokens, features, seed=2)
    weight = randn(pixels * parts * channels, features, seed=3) * features**-0.5
    bias = randn(pixels * parts * channels, seed=4)
    rms_weight = 1 + 0.3 * randn(channels, seed=5)
    fc1 = randn(hidden, channels, seed=6) * channels**-0.5, 0.5 * randn(hidden, seed=7)
    fc2 = randn(channels, hidden, seed=8) * hidden**-0.5, randn(channels, seed=9)
    return x, y, *(t.to(device, dtype) for t in (s, weight, bias, rms_weight, *fc1, *fc2))


def modulation(s, weight, bias, pixels, parts, channels):
    """In float64, part by part."""
    m = s.double() @ weight.double().T + bias.double()
    return m.view(len(s), pixels, parts, channels).unbind(2)


def norm(x, weight):
    """RMSNorm in float64."""
    return weight.double() * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
