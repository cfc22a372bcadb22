"""Backends that are optional Python packages."""

from __future__ import annotations

import functools
import importlib
import importlib.util

from torch import Tensor

from msdd_fast.backends._constant import constant_when_compiled


def can_use_package(x: Tensor, package: str, module: str, command: str) -> tuple[bool, str]:
    """Whether an optional GPU library is installed and can work on ``x``; ``command`` installs it."""
    if not _has_module(module):
        return False, f"{package} is not installed: {command}"
    if x.device.type != "cuda":
        return False, f"needs a CUDA tensor, got {x.device}"
    return True, package


@constant_when_compiled
def _has_module(name: str) -> bool:
    return _find_module(name)


@functools.cache
def _find_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None
