"""Shared by the benchmarks of all ops: a case with its inputs, the providers of an op, the metrics of a result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from msdd_fast.bench.timing.ceilings import copy_bandwidth, floor_seconds
from msdd_fast.bench.timing.harness import Measurement, Provider
from msdd_fast.errors import BackendUnavailableError

Measure = Callable[..., None]
"""The fixture ``measure`` of bench/conftest.py."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCALES = (32, 64, 128, 256)
PATCH = 8


@dataclass(frozen=True)
class Case:
    """One size to measure at; ``scale`` is the side of the image in pixels."""

    scale: int
    dtype: torch.dtype
    batch: int
    device: torch.device

    @property
    def tokens(self) -> int:
        """Image tokens at this scale, in patches of 8 pixels."""
        return (self.scale // PATCH) ** 2

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device).to(self.dtype)

    def image(self) -> Tensor:
        """(batch, 3, scale, scale)."""
        return self.randn(self.batch, 3, self.scale, self.scale)

    def seeds(self) -> Tensor:
        return torch.arange(self.batch, device=self.device)

    def scalar(self, value: float) -> Tensor:
        """A 0-d float32 tensor on the device, as the engine passes what varies."""
        return torch.tensor(value, device=self.device)

    def __str__(self) -> str:
        name = next(n for n, d in DTYPES.items() if d == self.dtype)
        return f"{self.scale}px-{name}"


@dataclass
class Providers:
    """The providers that run here, and the reason why each of the others does not."""

    usable: list[Provider] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)


def op_providers(
    op: Callable[..., Any],
    inputs: Sequence[Any],
    baselines: Mapping[str, Callable[..., Any]],
    backends: Sequence[str],
    compile_reason: str | None = None,
) -> Providers:
    """Baselines, ``torch.compile`` of the first one, and the op's backends, without gradients.

    torch.compile and the backends run once, to see whether they can. ``compile_reason``: why torch.compile is left out.
    """
    found = Providers()
    for name, function in baselines.items():
        found.usable.append(Provider(name, _call(function, inputs)))
    if compile_reason:
        found.missing["compile"] = compile_reason
    else:
        torch.compiler.reset()
        compiled = _call(torch.compile(next(iter(baselines.values())), dynamic=False), inputs)
        try:
            compiled()
            found.usable.append(Provider("compile", compiled))
        except Exception as error:  # any failure of the compiler is a result to report
            found.missing["compile"] = f"torch.compile failed: {type(error).__name__}: {str(error).splitlines()[0]}"
    for name in backends:
        function = _call(op, inputs, backend=name)
        try:
            function()
            found.usable.append(Provider(name, function))
        except BackendUnavailableError as error:
            found.missing[name] = str(error)
    return found


def in_float32(inputs: Sequence[Any]) -> list[Any]:
    """The inputs with every floating-point tensor, and every dtype that is passed as such, made float32."""

    def convert(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.float()
        return torch.float32 if isinstance(value, torch.dtype) and value.is_floating_point else value

    return [convert(value) for value in inputs]


def metrics(
    op: str, case: Case, shape: Sequence[int], m: Measurement, baseline: Measurement, num_bytes: int, flops: int = 0
) -> dict[str, Any]:
    """The JSON entry of a measurement: SI units, and fractions of the ceilings of this run."""
    copy = copy_bandwidth(case.device)
    rows: dict[str, Any] = {
        "op": op,
        "backend": m.provider,
        "scale": case.scale,
        "shape": list(shape),
        "dtype": str(case.dtype).removeprefix("torch."),
        "batch": case.batch,
        "device": str(case.device),
        "threads": torch.get_num_threads(),
        "median_us": m.median * 1e6,
        "p10_us": m.quantile(0.1) * 1e6,
        "p90_us": m.quantile(0.9) * 1e6,
        "images_per_second": case.batch / m.median,
        "gigabytes_per_second": num_bytes / m.median / 1e9,
        "fraction_of_copy": num_bytes / m.median / copy,
        "baseline": baseline.provider,
        "speedup": m.speedup(baseline),
        "max_error": m.max_error,
    }
    if flops:
        rows["teraflops"] = flops / m.median / 1e12
        rows["fraction_of_roofline"] = floor_seconds(case.device, case.dtype, num_bytes, flops) / m.median
    return rows


def _call(function: Callable[..., Any], inputs: Sequence[Any], **options: Any) -> Callable[[], Any]:
    def call() -> Any:
        with torch.no_grad():
            return function(*inputs, **options)

    return call
