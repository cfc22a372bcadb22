"""Fixtures common to all tests."""

from __future__ import annotations

import copy
import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.fresh import Fresh

ROOT = Path(__file__).resolve().parent.parent
HAS_GPU = torch.cuda.is_available()

# Without a GPU, Triton kernels run in its interpreter. Triton reads this when it is first imported, by whatever test.
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Engines on every CPU calculate alike, in float32; tests of bfloat16 ask for it. Without this a processor with bfloat16
# instructions would run other code, with other tolerances, than one without.
os.environ.setdefault("MSDD_FAST_CPU_BF16", "0")
os.environ.setdefault("MSDD_FAST_NATIVE_LINEAR", "0")

# A shell without job control starts background processes with Ctrl-C ignored, which the tests' own would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# An extension built in another way, such as with sanitizers (tests/csrc/test_sanitizers.py).
if "MSDD_FAST_TEST_EXTENSION" in os.environ:
    found = importlib.util.spec_from_file_location("msdd_fast._C", os.environ["MSDD_FAST_TEST_EXTENSION"])
    sys.modules["msdd_fast._C"] = importlib.util.module_from_spec(found)
    found.loader.exec_module(sys.modules["msdd_fast._C"])

# torch.device(...) contexts look up once which functions they apply to: before poison_empty replaces some of them.
with torch.device("cpu"):
    torch.empty(0)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_gpu(items, HAS_GPU)


def mark_gpu(items: list[Any], has_gpu: bool) -> None:
    """Mark the tests of the backend "triton" where there is a GPU; elsewhere the interpreter runs them."""
    for item in items:
        if has_gpu and hasattr(item, "callspec") and item.callspec.params.get("backend") == "triton":
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder of the reference data. Skips the test, with a hint, where there is none."""
    named = os.environ.get("MSDD_FAST_SHARED")
    candidates = [Path(named)] if named else [ROOT / "shared", ROOT.parent / "shared"]
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    looked = " or ".join(str(c) for c in candidates)
    pytest.skip(f"no reference data in {looked}: set MSDD_FAST_SHARED to the folder that holds fixtures/ and data/")


@pytest.fixture(scope="session")
def fresh() -> Iterator[Fresh]:
    """``fresh(code, NAME=value)`` runs code in a process that has imported PyTorch alone (tests/fresh.py)."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    processes = Fresh()
    yield processes
    processes.close()


def _poisoned(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def empty(*args: Any, **kwargs: Any) -> Tensor:
        out = function(*args, **kwargs)
        if not torch.compiler.is_compiling() and out.is_floating_point() and out.device.type in ("cpu", "cuda"):
            with torch.no_grad():
                out.fill_(float("nan"))
        return out

    return empty


@pytest.fixture(autouse=True)
def poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills what torch.empty and its relatives return with NaN, so that an element nobody writes cannot pass."""
    monkeypatch.setattr(torch, "empty", _poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", _poisoned(torch.empty_like))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(Tensor, name, _poisoned(getattr(Tensor, name)))


GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")])


@pytest.fixture(params=["cpu", GPU])
def on_device(request, monkeypatch):
    """Brings tokenizers (a copy) and tensors to the device under test; float32 convolutions are float32's there."""
    if request.param == "cpu":
        return lambda x: x
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return lambda x: x.cuda() if isinstance(x, Tensor) else copy.deepcopy(x).cuda()


@pytest.fixture
def one_thread():
    """Of PyTorch, for many small decodes: threads that wait for each other would take most of their time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
