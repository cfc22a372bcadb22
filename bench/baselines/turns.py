"""Every way to run one decoder, measured in turns: eager, torch.compile in a process of its own, the engine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from msdd_fast.bench.timing.clock import WallTimer
from msdd_fast.bench.timing.harness import Check, Provider, WrongResultError, compare
from msdd_fast.bench.timing.isolated import Isolated, IsolatedError, isolated

WAYS = ("eager", "compile", "engine")


@dataclass(frozen=True)
class Options:
    """Settings that all decoders of a run share; ``compile_seconds`` 0 leaves torch.compile out."""

    device: torch.device
    dtype: torch.dtype
    batch: int = 1
    rounds: int = 20
    seconds: float = 10.0
    compile_seconds: float = 60.0


def in_turns(name: str, ways: Mapping[str, Callable[[], Tensor]], options: Options) -> dict[str, dict[str, Any]]:
    """Measure ``ways`` and torch.compile of the decoder ``name``, one call each, in turns.

    Returns {"median_s", "samples", "first_s", "max_error"} of each, the error being the difference from the first way;
    for "compile" {"missing": reason} if it is not available.
    """
    providers = [Provider(way, run) for way, run in ways.items()]
    with contextlib.ExitStack() as stack:
        call, reason = _compile(stack, name, options)
        if call is not None:
            other = call
            providers.append(Provider("compile", lambda: other.result, lambda: sum(other.stage_seconds())))
        measured = compare(providers, _like_the_first(), WallTimer(), options.rounds, 0, options.seconds, min_rounds=1)
    timed: dict[str, dict[str, Any]] = {
        way: {"median_s": m.median, "samples": m.samples, "first_s": m.first_s, "max_error": m.max_error}
        for way, m in measured.items()
    }
    if call is None:
        timed["compile"] = {"missing": reason}
    else:
        timed["compile"]["first_s"] = call.first_s
    return timed


def _compile(stack: contextlib.ExitStack, name: str, options: Options) -> tuple[Isolated | None, str]:
    """``peers.compiled(name, ...)`` in a process that lives as long as ``stack``, or the reason why there is none."""
    if not options.compile_seconds:
        return None, "left out"
    arguments = {
        "name": name,
        "device": str(options.device),
        "dtype": str(options.dtype).removeprefix("torch."),
        "batch": options.batch,
    }
    factory = "msdd_fast.bench.baselines.peers:compiled"
    try:
        return stack.enter_context(isolated(factory, arguments, options.compile_seconds)), ""
    except IsolatedError as error:
        return None, f"torch.compile {error}"


def _like_the_first() -> Check:
    """A check for ``compare``: the largest difference from the first result, of the same shape; all finite."""
    seen: list[Tensor] = []

    def check(name: str, result: Tensor) -> float:
        seen.append(result.float().cpu())
        if seen[-1].shape != seen[0].shape or not seen[-1].isfinite().all():
            raise WrongResultError(f"{name} must give finite numbers of the shape {tuple(seen[0].shape)}")
        return float((seen[-1] - seen[0]).abs().max())

    return check
