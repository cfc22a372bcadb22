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
    return True, package


@constant_when_compiled
def is_installed(module: str) -> bool:
    """Whether a module can be imported; looked up once."""
    return _find_module(module)


@functools.cache
def _find_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


FLASH_ATTN = register_backend(
    "flash-attn",
    lambda x: can_use_package(x, "flash-attn", "flash_attn", "pip install flash-attn --no-build-isolation"),
)
XFORMERS = register_backend(
    "xformers", lambda x: can_use_package(x, "xformers", "xformers", "pip install 'xformers>=0.0.35'")
)
