"""Packages of the extra [eval] that need torchvision, and what makes torchvision import beside any build of PyTorch."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

from msdd_fast.errors import InputError

# Operators for which torchvision registers fake kernels while it is imported. They are in its compiled part, which does
# not load if it was built for CUDA and PyTorch for CPUs, or for another release.
_OPERATORS = ("nms", "qnms")
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_declared: list[torch.library.Library] = []


def import_package(module: str, package: str) -> ModuleType:
    """A module of the extra [eval], with ``package``, to which it belongs, in messages.

    Raises InputError if it is not installed or does not import.
    """
    try:
        _import_torchvision()
        return importlib.import_module(module)
    except ModuleNotFoundError as e:
        raise InputError(f"{package} is not installed ({e}): pip install 'msdd-fast[eval]'") from e
    except Exception as e:  # a broken build may raise anything
        raise InputError(f"{package} is installed but does not import: {type(e).__name__}: {e}") from e


def _import_torchvision() -> None:
    """Import torchvision, also where its compiled operators do not load: nothing here calls them."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError as e:
        if "torchvision::" not in str(e):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in _OPERATORS:
            library.define(name + _SCHEMA)
        _declared.append(library)  # an operator lives as long as its library
        importlib.import_module("torchvision")
