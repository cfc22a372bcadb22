"""quantize_rows of the rows of msdd-d12 against the same formula in plain PyTorch."""

from msdd_fast import ops
from msdd_fast.bench.ops.suite import Case, Measure
from msdd_fast.ops.quantize_rows import quantize_rows_eager

WIDTH = 768
BASELINES = {"plain": quantize_rows_eager}


def test_quantize_rows(case: Case, measure: Measure) -> None:
    x = case.randn(case.batch * case.tokens, WIDTH)
    # A compiler's quotient may put a number on the other side of a tie: one step between the largest numbers.
    measure(ops.quantize_rows, (x,), bytes_moved=x.nbytes + x.numel() + 4 * len(x), tolerance=32.0)
