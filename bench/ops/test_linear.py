"""linear of the image tokens of msdd-d12 to queries, keys and values, against torch's product and oneDNN's packed one.

"onednn" takes the weight in oneDNN's own layout, as the engine and Inductor do: bfloat16, on CPUs that have such
instructions. Elsewhere it is torch's product again.
"""

import functools

import torch
from torch import Tensor

from msdd_fast import ops
from msdd_fast.backends import extension_status
from msdd_fast.bench.ops.suite import Case, Measure
from msdd_fast.layers.linear.dense import can_pack
from msdd_fast.ops.linear import linear_eager, pack_linear

WIDTH, FEATURES = 768, 2304


@functools.lru_cache(maxsize=1)
def layout_of(weight: Tensor) -> Tensor:
    layout: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return layout


def onednn(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if not can_pack(weight):
        return plain(x, weight, bias)
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, layout_of(weight), bias, "none", [], "")
    return out


def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return linear_eager(x, weight, bias, None, False)


BASELINES = {"plain": plain, "onednn": onednn}


def test_linear(case: Case, measure: Measure) -> None:
    x = case.randn(case.batch * case.tokens, WIDTH)
    weight, bias = case.randn(FEATURES, WIDTH) * WIDTH**-0.5, case.randn(FEATURES)
    packs = case.device.type == "cpu" and extension_status()[0]
    moved = x.nbytes + weight.nbytes + len(x) * FEATURES * x.itemsize
    op = functools.partial(ops.linear, packed=pack_linear(weight) if packs else None)
    measure(op, (x, weight, bias), bytes_moved=moved, flops=2 * x.numel() * FEATURES, tolerance=0.05)
