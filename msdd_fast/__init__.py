"""msdd-fast: decode image latents to pixels as fast as the hardware allows.

Importing the package loads neither Triton nor the compiled extension and starts no CUDA context.
"""

from typing import Any

from msdd_fast import _moved, errors, sampling
from msdd_fast.engine import FastDecoder, accelerate, explain
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

_moved.install()


def __getattr__(name: str) -> Any:
    """Modules of version 0.1 as attributes: ``msdd_fast.config``."""
    return _moved.module(name)
