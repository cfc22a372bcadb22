"""msdd-fast: decode image latents to pixels as fast as the hardware allows.

Importing the package loads neither Triton nor the compiled extension and starts no CUDA context.
"""

from msdd_fast import config, errors, sampling
from msdd_fast.config import TokenizerConfig
from msdd_fast.engine import FastDecoder, accelerate, explain
from msdd_fast.models.tokenizer import Tokenizer

__version__ = "0.1.0"

__all__ = [
    "FastDecoder",
    "Tokenizer",
    "TokenizerConfig",
    "__version__",
    "accelerate",
    "config",
    "errors",
    "explain",
    "sampling",
]
