"""msdd-fast: decode image latents to pixels as fast as the hardware allows.

Importing the package imports nothing else. The names below are imported, and PyTorch with them, when they are first
used; Triton, the compiled extension and a CUDA context when an op needs them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from msdd_fast import _moved

if TYPE_CHECKING:
    from msdd_fast import errors, sampling
    from msdd_fast.engine.decoder import FastDecoder, accelerate
    from msdd_fast.engine.explain import explain
    from msdd_fast.families.msdd.config import TokenizerConfig
    from msdd_fast.tokenizer import Tokenizer

__version__ = "0.2.0"

__all__ = [
    "FastDecoder",
    "Tokenizer",
    "TokenizerConfig",
    "__version__",
    "accelerate",
    "errors",
    "explain",
    "sampling",
]

# Name -> where it is; a module of that name has no attribute to take from it.
_PLACES = {
    "FastDecoder": "engine",
    "Tokenizer": "tokenizer",
    "TokenizerConfig": "families.msdd.config",
    "accelerate": "engine",
    "errors": None,
    "explain": "engine",
    "sampling": None,
}

_moved.install()


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        return _moved.module(name)  # a module of version 0.1, such as msdd_fast.config
    place = _PLACES[name]
    module = importlib.import_module(f"msdd_fast.{place or name}")
    value = module if place is None else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
