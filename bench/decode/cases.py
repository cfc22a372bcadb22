"""The decodes and encodes that ``msdd-fast bench`` measures, and the suites made of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

from msdd_fast.bench.timing.harness import MIN_ROUNDS


@dataclass(frozen=True)
class DecodeCase:
    """One table of the report.

    Attributes:
        model: a checkpoint or a preset.
        kind: "decode" or "encode".
        seconds: timing budget of each provider, counted from its ``min_rounds``-th round on; preparation comes on top.
        compile_seconds: time limit of torch.compile's first call; 0 leaves torch.compile out.
    """

    model: str
    batch: int = 1
    steps: int = 1
    cfg_scale: float = 1.0
    kind: str = "decode"
    seconds: float = 8.0
    min_rounds: int = MIN_ROUNDS
    compile_seconds: float = 60.0

    @property
    def name(self) -> str:
        if self.kind == "encode":
            return f"{self.model} encode, batch {self.batch}"
        steps = f"{self.steps} step{'s' * (self.steps > 1)}"
        return f"{self.model} decode, batch {self.batch}, {steps}, CFG {self.cfg_scale:g}"


def standard() -> list[DecodeCase]:
    """Under ten minutes on two CPU cores, where one bfloat16 decode of 12 layers may take twenty seconds."""
    nano = [DecodeCase("msdd-nano", batch, seconds=4.0, compile_seconds=150.0) for batch in (1, 8)]
    encodes = [replace(case, kind="encode", seconds=3.0, compile_seconds=0.0) for case in nano]
    names = ("msdd-d12-joint", "msdd-d12")
    large = [DecodeCase(name, seconds=6.0, min_rounds=1, compile_seconds=240.0) for name in names]
    return [*nano, *encodes, *large]


def full() -> list[DecodeCase]:
    """For a GPU: all MSDD models at batch 1, 8 and 64, one and 30 steps, with and without guidance; PiD."""
    names = ("msdd-nano", "msdd-d12", "msdd-d12-joint", "msdd-d12-joint-3scale", "msdd-d12-single-scale")
    settings = itertools.product(names, (1, 8, 64), ((1, 1.0), (1, 2.0), (30, 1.0), (30, 2.0)))
    decodes = [DecodeCase(name, batch, steps, cfg, compile_seconds=900.0) for name, batch, (steps, cfg) in settings]
    encodes = [
        DecodeCase(name, batch, kind="encode", compile_seconds=900.0) for name in names[:3] for batch in (1, 8, 64)
    ]
    # 64 x 64 latents to 2048 pixels.
    large = DecodeCase("pid-v15-flux", steps=4, seconds=20.0, min_rounds=3, compile_seconds=900.0)
    return [*decodes, *encodes, large]


def gate() -> list[DecodeCase]:
    """At most a minute: small enough to run for every change."""
    return [
        DecodeCase("msdd-nano", 1, seconds=4.0, compile_seconds=0.0),
        DecodeCase("msdd-nano", 8, seconds=5.0, compile_seconds=0.0),
        DecodeCase("msdd-nano", 1, kind="encode", seconds=2.0, compile_seconds=0.0),
    ]


SUITES: dict[str, Callable[[], list[DecodeCase]]] = {"standard": standard, "full": full, "gate": gate}
