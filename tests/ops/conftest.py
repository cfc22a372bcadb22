"""Backends of the ops under test: Triton on the GPU if there is one, else in its interpreter (tiny shapes)."""

import pytest
import torch

from msdd_fast.backends import extension_status
from tests.conftest import HAS_GPU
from tests.tolerances import assert_no_worse, assert_rounded_once


def skip_without_extension(backend):
    if backend == "cpu" and not extension_status()[0]:
        pytest.skip(f"backend 'cpu': {extension_status()[1]}")


@pytest.fixture(params=["cpu", "triton"])
def backend(request):
    """A backend that is not the reference; skipped with its reason where it cannot run."""
    skip_without_extension(request.param)
    return request.param


@pytest.fixture(autouse=True)
def named_backend(request):
    """Skips a test whose parameter ``name`` is a backend that cannot run."""
    if hasattr(request.node, "callspec"):
        skip_without_extension(request.node.callspec.params.get("name"))


@pytest.fixture
def device(backend):
    return torch.device("cuda" if HAS_GPU and backend == "triton" else "cpu")


@pytest.fixture
def assert_rounded(backend):
    """``tolerances.assert_rounded_once`` for this backend."""

    def check(actual, exact, dtype):
        assert_rounded_once(actual.cpu(), exact.cpu(), dtype, interpreted=backend == "triton" and not HAS_GPU)

    return check


@pytest.fixture
def assert_near(backend):
    """``tolerances.assert_no_worse`` for this backend."""

    def check(actual, eager, exact, dtype):
        interpreted = backend == "triton" and not HAS_GPU
        assert_no_worse(actual.cpu(), eager.cpu(), exact.cpu(), dtype, interpreted=interpreted)

    return check
