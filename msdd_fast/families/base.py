"""What the library has to know of a family of tokenizers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Protocol

import torch

from msdd_fast.layers.linear.dense import MakeLinear
from msdd_fast.layers.request import DecodeProgram
from msdd_fast.tokenizer import Tokenizer


class Family(Protocol):
    """Knows a config, but keeps no tokenizer. ``tables`` is whatever the family's own ``program`` takes."""

    @property
    def example(self) -> tuple[int, ...]:
        """Shape of the latents of one image of ``config.image_size``."""
        ...

    @property
    def model(self) -> str:
        """The model in a line of the report."""
        ...

    @property
    def constant(self) -> tuple[str, ...]:
        """What the engine made constant, for the report."""
        ...

    def check(self, steps: int, cfg_scale: float) -> None:
        """Raise InputError for sampling that the family does not have."""
        ...

    def tables(self, tokenizer: Tokenizer, steps: int, device: torch.device) -> Any:
        """What depends on time alone."""
        ...

    def program(
        self,
        tokenizer: Tokenizer,
        tables: Any,
        dtype: torch.dtype,
        device: torch.device,
        ops: SimpleNamespace,
        make: MakeLinear,
    ) -> DecodeProgram: ...

    def tables_memory(self, tables: Any) -> int:
        """Bytes."""
        ...

    def activation_bytes(self, itemsize: int, guided: bool, quantized: bool) -> int:
        """Upper bound for one image of ``config.image_size``."""
        ...
