"""The compiled extension ``msdd_fast._C``: looked for on first request, never when the package is imported."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import platform
from pathlib import Path
from types import ModuleType
from typing import Any

from msdd_fast.backends._constant import constant_when_compiled
from msdd_fast.errors import BackendUnavailableError, InputError

_PACKAGE = Path(__file__).resolve().parents[1]


def load_extension() -> ModuleType:
    """The module ``msdd_fast._C``. Raises BackendUnavailableError with the reason and the command that helps."""
    module, reason = _probe()
    if module is None:
        raise BackendUnavailableError(f"backend 'cpu' needs the compiled extension msdd_fast._C, which {reason}")
    return module


def cpu_level(function: str) -> str:
    """The level of instructions by this function of the extension. Raises InputError for a bad MSDD_FAST_CPU_LEVEL."""
    try:
        level: str = getattr(load_extension(), function)()
    except ValueError as error:
        raise InputError(str(error)) from None
    return level


@constant_when_compiled
def extension_status() -> tuple[bool, str]:
    """Whether ``msdd_fast._C`` can be used, and what it is or why not. Raises nothing."""
    module, reason = _probe()
    return module is not None, reason


def build_info() -> dict[str, Any]:
    """What the install wrote about the build (``_build_info.json``); empty if the package was never installed."""
    try:
        info = json.loads((_PACKAGE / "_build_info.json").read_text())
    except (OSError, ValueError):
        return {}
    return info if isinstance(info, dict) else {}


@functools.cache
def _probe() -> tuple[ModuleType | None, str]:
    info = build_info()
    try:
        module = importlib.import_module("msdd_fast._C")
    except Exception as error:  # a damaged file may raise anything
        return None, _explain(info, error)
    cuda = f"CUDA {', '.join(info.get('cuda_archs', []))}" if info.get("cuda") else "no CUDA"
    return module, f"was built with {info.get('compiler', 'an unknown compiler')}, {cuda}"


def _explain(info: dict[str, Any], error: Exception) -> str:
    if not info.get("compiled"):
        reason = info.get("reason") or "the package was never installed, only put on the path"
        return f"was not built: {reason}. To build it: {_rebuild_command()}"
    built, here = str(info.get("python")), platform.python_version()
    if built.split(".")[:2] != here.split(".")[:2]:
        return f"was built for Python {built}, but this is Python {here}. To build it anew: {_rebuild_command()}"
    return f"was built but cannot be loaded: {error}. To build it anew: {_rebuild_command()}"


def _rebuild_command() -> str:
    """Shell command that builds the extension or fails loudly."""
    root = _PACKAGE.parent
    if (root / "setup.py").is_file():
        return f"MSDD_FAST_BUILD_EXT=1 pip install --no-deps -e {root}"
    return "MSDD_FAST_BUILD_EXT=1 pip install --force-reinstall --no-deps PATH_TO_MSDD_FAST_SOURCES"


def _rebuild_cuda_command() -> str:
    return f"MSDD_FAST_BUILD_CUDA=1 {_rebuild_command()}"
