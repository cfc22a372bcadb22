"""Optional packages that import torchvision, and what makes torchvision import beside any build of PyTorch."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from types import ModuleType

import torch

from msdd_fast.errors import InputError

# Operators for which torchvision registers fake kernels while it is imported. They are in its compiled part, which does
# not load if it was built for CUDA and PyTorch for CPUs, or for another release.
_OPERATORS = ("nms", "qnms")
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_declared: list[torch.library.Library] = []


def import_package(module: str, package: str, extra: str) -> ModuleType:
    """A module of the optional ``package``. Raises InputError as ``optional``."""
    with optional(package, extra):
        return importlib.import_module(module)


@contextlib.contextmanager
def optional(package: str, extra: str) -> Iterator[None]:
    """For imports of a package that comes with an extra of this one.

    Raises InputError if it, or what it needs, is not installed or does not import.
    """
    try:
        _import_torchvision()
        yield
    except Exception as e:  # a broken build may raise anything
        cause: BaseException = e
        while cause.__cause__ is not None:  # packages that import lazily wrap what happened
            cause = cause.__cause__
        if isinstance(cause, ModuleNotFoundError):
            raise InputError(f"{package} is not installed ({cause}): pip install 'msdd-fast[{extra}]'") from e
        raise InputError(f"{package} is installed but does not import: {type(cause).__name__}: {cause}") from e


def _import_torchvision() -> None:
    """Import torchvision, also where its compiled operators do not load: nothing here calls them.

    Does nothing if it is not installed, or fails in another way: not every package needs it.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError as e:
        if "torchvision::" not in str(e):
            return
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in _OPERATORS:
            library.define(name + _SCHEMA)
        _declared.append(library)  # an operator lives as long as its library
        importlib.import_module("torchvision")
    except Exception:
        return
