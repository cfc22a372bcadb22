"""pixel_modulate of PiD's patches of 16 x 16 pixels, against a matrix product, a norm and two pointwise ops."""

from msdd_fast import backends, ops
from msdd_fast.bench.ops.suite import Case, Measure
from msdd_fast.bench.timing.harness import FLOAT32_SLACK, ROUNDING
from msdd_fast.ops.linear import pack_linear
from msdd_fast.ops.pixel_modulate import pixel_modulate_eager

WIDTH, PIXELS, CHANNELS = 1536, 256, 16
BATCH = {"cpu": 1, "cuda": 8}
BASELINES = {"plain": pixel_modulate_eager}


def test_pixel_modulate(case: Case, measure: Measure) -> None:
    tokens = case.batch * max(1, case.tokens // 4)  # patches of 16
    x, s = case.randn(tokens, PIXELS, CHANNELS), case.randn(tokens, WIDTH)
    weight = WIDTH**-0.5 * case.randn(PIXELS * 2 * CHANNELS, WIDTH)
    packs = case.device.type == "cpu" and backends.extension_status()[0]
    packed = pack_linear(weight) if packs else None
    inputs = (x, s, weight, 0.1 * case.randn(len(weight)), 1 + 0.1 * case.randn(CHANNELS), packed)
    tolerance = 8 * ROUNDING[case.dtype] * 8 + 16 * FLOAT32_SLACK  # a sum of 1536 products in another order
    moved = 2 * x.nbytes + s.nbytes + weight.nbytes
    flops = 2 * tokens * WIDTH * len(weight)
    measure(ops.pixel_modulate, inputs, bytes_moved=moved, flops=flops, tolerance=tolerance)
