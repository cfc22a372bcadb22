"""How many examples the fuzzers try: few in ``make test``, always the same; many new ones in ``make fuzz``."""

import os

import pytest
from hypothesis import HealthCheck, settings

from tests.fuzz.law import COLUMNS, TOTALS

COMMON = {
    "deadline": None,  # law.SECONDS
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
}
settings.register_profile("short", max_examples=300, derandomize=True, **COMMON)
settings.register_profile("long", max_examples=int(os.environ.get("MSDD_FAST_FUZZ") or 100_000), **COMMON)
settings.load_profile("long" if os.environ.get("MSDD_FAST_FUZZ") else "short")


@pytest.hookimpl
def pytest_terminal_summary(terminalreporter):
    if not TOTALS:
        return
    terminalreporter.section("fuzzers")
    terminalreporter.write_line(f"{'':>16}" + "".join(f"{c:>10}" for c in COLUMNS))
    for name, total in TOTALS.items():
        terminalreporter.write_line(f"{name:>16}" + "".join(f"{total[c]:>10}" for c in COLUMNS))
