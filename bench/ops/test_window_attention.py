"""window_attention of SSDD-S: 4 heads of 40 on the map of 1/8 of the resolution, a window of 15 x 15, views of one
packed buffer; against dense attention with a mask, as the paper's code has it. The backend sdpa has one, too.
"""

from msdd_fast import ops
from msdd_fast.bench.ops.suite import Case, Measure
from msdd_fast.ops.window_attention import window_attention_eager

HEADS, HEAD_SIZE, WINDOW = 4, 40, 8
BATCH = {"cpu": 1, "cuda": 64}


BASELINES = {"dense": window_attention_eager}


def test_window_attention(case: Case, measure: Measure) -> None:
    grid = case.scale // 8
    q, k, v = case.randn(case.batch, grid**2, 3, HEADS, HEAD_SIZE).unbind(2)
    table = case.randn(2 * WINDOW - 1, 2 * WINDOW - 1, HEADS)
    seen = sum(min(grid, i + WINDOW) - max(0, i - WINDOW + 1) for i in range(grid)) ** 2  # of all queries
    flops = 4 * case.batch * HEADS * HEAD_SIZE * seen
    measure(ops.window_attention, (q, k, v, table, grid, grid), bytes_moved=4 * q.nbytes, flops=flops)
