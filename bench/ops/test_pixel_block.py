"""pixel_block of PiD's patches of 16 x 16 pixels, against matrix products, a norm and pointwise ops."""

from msdd_fast import backends, ops
from msdd_fast.bench.ops.suite import Case, Measure
from msdd_fast.bench.timing.harness import FLOAT32_SLACK, ROUNDING
from msdd_fast.ops.linear import pack_linear
from msdd_fast.ops.pixel_block import pixel_block_eager

WIDTH, PIXELS, CHANNELS, HIDDEN = 1536, 256, 16, 64
BATCH = {"cpu": 1, "cuda": 8}
BASELINES = {"plain": pixel_block_eager}


def test_pixel_block(case: Case, measure: Measure) -> None:
    tokens = case.batch * max(1, case.tokens // 4)  # patches of 16
    x, y, s = (case.randn(tokens, *shape) for shape in ((PIXELS, CHANNELS), (PIXELS, CHANNELS), (WIDTH,)))
    weight = WIDTH**-0.5 * case.randn(PIXELS * 4 * CHANNELS, WIDTH)
    packs = case.device.type == "cpu" and backends.extension_status()[0]
    packed = pack_linear(weight) if packs else None
    fc1 = CHANNELS**-0.5 * case.randn(HIDDEN, CHANNELS), 0.1 * case.randn(HIDDEN)
    fc2 = HIDDEN**-0.5 * case.randn(CHANNELS, HIDDEN), 0.1 * case.randn(CHANNELS)
    inputs = (x, y, s, weight, 0.1 * case.randn(len(weight)), 1 + 0.1 * case.randn(CHANNELS), *fc1, *fc2, packed)
    tolerance = 8 * ROUNDING[case.dtype] * 16 + 16 * FLOAT32_SLACK  # a sum of 1536 products in another order
    moved = 3 * x.nbytes + s.nbytes + weight.nbytes
    flops = 2 * tokens * (WIDTH * len(weight) + 2 * PIXELS * CHANNELS * HIDDEN)
    measure(ops.pixel_block, inputs, bytes_moved=moved, flops=flops, tolerance=tolerance)
