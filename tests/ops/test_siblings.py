"""One op, one name: every kernel has its op, every op its test and its benchmark."""

from pathlib import Path

from msdd_fast import ops

ROOT = Path(__file__).resolve().parents[2]


def test_no_stem_lacks_its_siblings():
    kernels = {p.stem for p in (ROOT / "kernels").glob("*.py") if not p.stem.startswith("_")}
    files = {p.stem for p in (ROOT / "msdd_fast/ops").glob("*.py") if not p.stem.startswith("_")}
    tests = {p.stem.removeprefix("test_") for p in (ROOT / "tests/ops").glob("test_*.py")}
    benchmarks = {p.stem.removeprefix("test_") for p in (ROOT / "bench/ops").glob("test_*.py")}
    assert files == set(ops.__all__)
    assert kernels <= files
    assert files <= tests
    assert files == benchmarks
