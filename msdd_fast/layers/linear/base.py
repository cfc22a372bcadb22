"""What every matrix product of the engine has in common: rows (R, in) to rows (R, out), written where the caller wants
them, with the SwiGLU of both halves if that is what follows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

from torch import Tensor

Swiglu = Callable[[Tensor, Tensor], Tensor]
"""The op: silu(a) * b."""


class Linear(Protocol):
    """y = x W^T + b of rows, or the SwiGLU of its halves. ``out`` may be a slice of columns or rows of a buffer."""

    out_features: int
    row_bytes: int
    """What a call holds for each row besides what comes in and goes out."""

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor: ...

    def memory(self) -> int:
        """Bytes of the weights."""
        ...


class MakeLinear(Protocol):
    """Turns a weight (out, in) and a bias into a Linear; with ``swiglu``, [w1; w3] into its activation."""

    def __call__(self, weight: Tensor, bias: Tensor | None, swiglu: Swiglu | None = None) -> Linear: ...


def is_within(swiglu: Swiglu | None) -> bool:
    """Whether a product of the extension does ``swiglu`` itself: not where another backend was asked for by name."""
    return swiglu is not None and getattr(swiglu, "backend", None) in (None, "cpu")


class LinearBase(ABC):
    """A product, followed by the op ``swiglu`` where the weight (2 I, in) is [w1; w3].

    Attributes:
        features: rows of the weight.
        out_features: columns of the result.
        row_bytes: what a call holds for each row besides what comes in and goes out.
        description: who multiplies, and why.
    """

    description: str

    def __init__(self, weight: Tensor, swiglu: Swiglu | None) -> None:
        self.features, self.swiglu = len(weight), swiglu
        self.out_features = self.features if swiglu is None else self.features // 2
        self.row_bytes = 0 if swiglu is None else self.features * weight.itemsize

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        if self.swiglu is None:
            return self.product(x, out)
        y = self.swiglu(*self.product(x, None).chunk(2, dim=1))
        return y if out is None else out.copy_(y)

    @abstractmethod
    def product(self, x: Tensor, out: Tensor | None) -> Tensor:
        """x W^T + b, without the SwiGLU."""

    @abstractmethod
    def memory(self) -> int:
        """Bytes of the weights."""
