"""What a kernel states about itself so that it can be compiled ahead of time: ``AOT_CASES`` of every kernels/<op>.py.

    AOT_CASES = (AotCase("swiglu_kernel", {"BLOCK": 1024}, num_warps=4, outputs=lambda c: c["BLOCK"]),)

Types of arguments follow from their names: ``p_*`` is a pointer to the dtype under test, any other an int32. ``types``
names the exceptions. ``msdd_fast.bench.work.aot`` collects the cases, compiles them and reads the binaries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
"""Bytes of an element of each dtype under test."""
NVIDIA = ("80", "90", "100")
FLOAT8 = ("89", "90", "100")
AMD = ("gfx942", "gfx950")
TARGETS = ("80", "89", "90", "100", *AMD)

# Sizes of msdd-d12: rows of the transformer, hidden width of its MLP, context tokens; RGB images in patches of 8.
WIDTH, HEADS, HEAD_DIM, HIDDEN, CONTEXT = 768, 12, 64, 2048, 128
CHANNELS, PATCH = 3, 8
# Of PiD: width of its tokens, heads and head sizes of its attentions, channels of its pixels, its patches.
PID_WIDTH, PID_HEADS, PID_CHANNELS, PID_PATCH = 1536, ((24, 64), (16, 72)), 16, 16

Constants = Mapping[str, Any]


@dataclass(frozen=True)
class AotCase:
    """One kernel as it is launched."""

    kernel: str
    """Name of the jitted function in the case's module."""
    constants: Constants | Callable[[int], Constants]
    """Compile-time constants; a function of the bytes of an element where they depend on it."""
    num_warps: int
    outputs: Callable[[Constants], int]
    """Elements that one program writes."""
    types: Mapping[str, str] = field(default_factory=dict)
    """Triton types of arguments whose names do not say theirs."""
    variant: str = ""
    within: tuple[str, ...] = ()
    """Axes of the grid that count inside one image or row, where indices fit in 32 bits (ops/_checks.check_blocks)."""
    dtypes: tuple[str, ...] = tuple(DTYPES)
    targets: tuple[str, ...] = (*NVIDIA, *AMD)
    """Those that have the instructions it needs."""

    def constants_for(self, dtype: str) -> Constants:
        return self.constants(DTYPES[dtype]) if callable(self.constants) else self.constants

    def signature(self, arguments: Sequence[str], dtype: str) -> dict[str, str]:
        """Triton type of each argument; "constexpr" for the compile-time constants."""
        constants = self.constants_for(dtype)

        def kind(name: str) -> str:
            if name in constants:
                return "constexpr"
            return self.types.get(name) or (f"*{dtype}" if name.startswith("p_") else "i32")

        return {name: kind(name) for name in arguments}


def float32(*names: str) -> dict[str, str]:
    """``types`` for pointers to float32 tables and scalars: float32("dt") is {"p_dt": "*fp32"}."""
    return {f"p_{name}": "*fp32" for name in names}


# The scalars of kernels that make noise.
NOISE_TYPES = {"p_seeds": "*i64", **float32("alpha", "beta"), "spread": "fp32", "common": "fp32"}
