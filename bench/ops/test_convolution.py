"""convolution of a residual block of ssdd-xs, with the norm, scale and shift at 1/4 of the resolution, and the residual
(``--scales 64``: 64 x 64 pixels, cells of 16 x 16), against PyTorch's group norm and convolution.

"two calls" norms by ``group_norm_modulate_silu`` and convolves by ``conv2d``; it goes through cuDNN and oneDNN, too.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from msdd_fast import ops
from msdd_fast.backends import extension_status
from msdd_fast.bench.ops.suite import Case, Measure
from msdd_fast.ops.convolution import convolution_eager, pack_convolution

CHANNELS, GROUPS, EPS, CELL = 64, 32, 1e-5, 4
BATCH = {"cpu": 1, "cuda": 64}


def plain(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, added: Tensor) -> Tensor:
    return convolution_eager(x, weight, bias, None, "same", GROUPS, EPS, True, None, None, scale, shift, added)


def two_calls(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, added: Tensor) -> Tensor:
    h = ops.group_norm_modulate_silu(x, GROUPS, EPS, scale=scale, shift=shift)
    return F.conv2d(h, weight, bias, padding=1) + added


BASELINES = {"plain": plain, "two calls": two_calls}


def test_convolution(case: Case, measure: Measure) -> None:
    def a_map() -> Tensor:
        shape = case.batch, CHANNELS, case.scale, case.scale
        return case.randn(*shape).contiguous(memory_format=torch.channels_last)

    x, added, side = a_map(), a_map(), case.scale // CELL
    weight = (case.randn(CHANNELS, CHANNELS, 3, 3) * (9 * CHANNELS) ** -0.5).contiguous(
        memory_format=torch.channels_last
    )
    wide = 0.1 * case.randn(case.batch, side, side, 2 * CHANNELS)
    scale, shift = wide.permute(0, 3, 1, 2).chunk(2, dim=1)
    packs = case.device.type == "cpu" and extension_status()[0]
    op = functools.partial(_op, packed=pack_convolution(weight) if packs else None)
    moved, flops = 4 * x.nbytes + weight.nbytes, 18 * CHANNELS * CHANNELS * x[:, 0].numel()
    inputs = (x, weight, case.randn(CHANNELS), scale, shift, added)
    measure(op, inputs, bytes_moved=moved, flops=flops, tolerance=0.1)


def _op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    shift: Tensor,
    added: Tensor,
    packed: Tensor | None,
    backend: str | None = None,
) -> Tensor:
    norm = "same", GROUPS, EPS, True, None, None, scale, shift
    return ops.convolution(x, weight, bias, None, *norm, added, packed=packed, backend=backend)
