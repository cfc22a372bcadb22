"""Backends that are optional Python packages for GPUs: "flash-attn" and "xformers"."""

from __future__ import annotations

import functools
import importlib
import importlib.util

from torch import Tensor

from msdd_fast.backends._constant import constant_when_compiled
from msdd_fast.backends.choice import Verdict, register_backend


def can_use_package(x: Tensor, package: str, module: str, command: str) -> Verdict:
    """Whether an optional GPU library is installed and can work on ``x``; ``command`` installs it."""
    if not is_installed(module):
        return False, f"{package} is not installed: {command}"
    if x.device.type != "cuda":
        return False, f"needs a CUDA tensor, got {x.device}"
    return imports(module, package)


@constant_when_compiled
def is_installed(module: str) -> bool:
    """Whether a module is there; looked up once. It may still not import: ``imports``."""
    return _find_module(module)


@constant_when_compiled
def imports(module: str, package: str) -> Verdict:
    """Whether an installed module can be imported, which is tried once, and why not. Raises nothing."""
    problem = _import_problem(module)
    return problem is None, package if problem is None else f"{package} is installed but does not import: {problem}"


@functools.cache
def _find_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # ValueError: a module without a spec
        return False


@functools.cache
def _import_problem(name: str) -> str | None:
    try:
        importlib.import_module(name)
    except Exception as error:  # a broken build may raise anything
        lines = str(error).splitlines() or [""]
        return f"{type(error).__name__}: {lines[0]}"
    return None


FLASH_ATTN = register_backend(
    "flash-attn",
    lambda x: can_use_package(x, "flash-attn", "flash_attn", "pip install flash-attn --no-build-isolation"),
)
XFORMERS = register_backend(
    "xformers", lambda x: can_use_package(x, "xformers", "xformers", "pip install 'xformers>=0.0.35'")
)
