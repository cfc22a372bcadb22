"""img/s of whole decodes, of each scale and of encodes, for every provider, in interleaved rounds.

Providers: ``eager-bf16`` (plain PyTorch in bfloat16, nothing hoisted), plain PyTorch and ``torch.compile`` of it in the
engine's compute dtype, and the engine in each of its tiers. torch.compile runs in a process of its own
(timing/isolated.py), which is stopped if its first call exceeds the case's limit; the table then says so.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from msdd_fast.bench.decode import waterfall
from msdd_fast.bench.decode.cases import DecodeCase
from msdd_fast.bench.decode.coldstart import cold_start
from msdd_fast.bench.decode.models import (
    SHORT,
    TOLERANCE,
    by_block,
    conditions,
    device_of,
    load,
    plain,
    random_latents,
    resolutions_of,
)
from msdd_fast.bench.decode.staged import StagedRun, engine_stages, untimed
from msdd_fast.bench.report.results import FORMAT
from msdd_fast.bench.timing.ceilings import copy_bandwidth, gemm_rate
from msdd_fast.bench.timing.clock import WallTimer
from msdd_fast.bench.timing.harness import Measurement, Provider, close_to, compare
from msdd_fast.bench.timing.isolated import Isolated, IsolatedError, started
from msdd_fast.bench.timing.machine import machine_info
from msdd_fast.engine import FastDecoder, accelerate
from msdd_fast.engine.compute import compute_dtype
from msdd_fast.engine.decoder import TIERS
from msdd_fast.errors import AccuracyError, BackendUnavailableError, InputError
from msdd_fast.families import family_of
from msdd_fast.families.work import total
from msdd_fast.tokenizer import Tokenizer

ROUNDS = 200
# A compilation keeps about one core busy, and holds a model of its own in memory.
AT_ONCE = 6

Compiled = tuple[Isolated | None, str | None]
"""torch.compile of a case, or the reason why it is missing."""


@dataclass(frozen=True)
class Candidate:
    """One provider of a case: ``whole`` decodes at once, ``staged`` records the time of each scale."""

    name: str
    dtype: torch.dtype
    whole: Callable[[], Tensor]
    staged: StagedRun
    clock: Callable[[bool], float] | None = None
    """Seconds of one more call, staged or not, if another process makes it."""
    first_s: float | None = None

    def provider(self, staged: bool) -> Provider:
        """For ``compare``."""
        clock = None if self.clock is None else functools.partial(self.clock, staged)
        return Provider(self.name, self.staged if staged else self.whole, clock)


def candidates(
    tokenizer: Tokenizer, case: DecodeCase, compiler: str, other: Isolated | None
) -> tuple[list[Candidate], dict[str, str]]:
    """Providers, and the reasons why others are missing; ``other``: the process of the provider ``compiler``."""
    dtype = compute_dtype(torch.bfloat16, device_of(tokenizer))[0]
    missing: dict[str, str] = {}
    found: list[Candidate] = []
    for d in dict.fromkeys((torch.bfloat16, dtype)):
        run = plain(tokenizer, case, d)
        found.append(Candidate(f"eager-{SHORT[d]}", d, functools.partial(run, untimed), StagedRun(run)))
    if other is not None:
        found.append(_isolated(compiler, dtype, other))
    if case.kind == "encode":
        return found, missing
    z = random_latents(tokenizer.config, case.batch, device_of(tokenizer))
    for tier in TIERS:
        try:
            engine = accelerate(
                tokenizer, tier=tier, batch_sizes=(case.batch,), steps=case.steps, cfg_scale=case.cfg_scale
            )
        except (AccuracyError, BackendUnavailableError, InputError) as error:
            missing[f"engine-{tier}"] = str(error)
        else:
            found.append(_engine(f"engine-{tier}", engine, z))
    return found, missing


def _engine(name: str, engine: FastDecoder, z: Tensor) -> Candidate:
    staged = StagedRun(functools.partial(engine_stages, engine, z))
    return Candidate(name, engine.dtype, functools.partial(engine.decode, z, **conditions(engine.config)), staged)


def _isolated(name: str, dtype: torch.dtype, other: Isolated) -> Candidate:
    """A provider that another process runs and times; its first call has been made."""
    staged = StagedRun(lambda _: other.result)

    def clock(with_stages: bool) -> float:
        *stages, rest = other.stage_seconds(with_stages)
        if with_stages:
            staged.seconds.append(stages)
        return sum(stages) + rest

    return Candidate(name, dtype, lambda: other.result, staged, clock, other.first_s)


def measure_case(
    tokenizer: Tokenizer, case: DecodeCase, rounds: int = ROUNDS, other: Compiled | None = None
) -> dict[str, Any]:
    """All providers of one case as plain data; samples are seconds of one call. ``other``: what ``compile_all`` gave.

    ``tokenizer`` is ``load(case.model)``; torch.compile has a copy of its own. On a CPU recording the end of each scale
    is free, so one run gives the whole and its scales. On a GPU it waits for the device, so the scales are timed in a
    second run.

    Raises InputError for a case whose family does not count its work.
    """
    device = device_of(tokenizer)
    cuda = device.type == "cuda"
    work = work_of(tokenizer, case)
    with contextlib.ExitStack() as stack:
        name = f"compile-{SHORT[compute_dtype(torch.bfloat16, device)[0]]}"
        if case.kind == "decode" and by_block(tokenizer):
            name += " by block"
        call, reason = other or compile_all(stack, [case], device)[0]
        found, missing = candidates(tokenizer, case, name, call)
        check = close_to(plain(tokenizer, case, torch.float32)(untimed), TOLERANCE)
        timer = WallTimer()
        whole = [c.provider(staged=not cuda) for c in found]
        parts = results = compare(whole, check, timer, rounds, 0, case.seconds, case.min_rounds)
        if cuda and case.kind == "decode":
            staged = [c.provider(staged=True) for c in found]
            parts = compare(staged, check, timer, rounds, 1, case.seconds, case.min_rounds)
    return {
        "case": {"name": case.name, **asdict(case)},
        "providers": [_metrics(tokenizer, case, c, results[c.name], len(parts[c.name].samples)) for c in found],
        "missing": {**({name: reason} if reason else {}), **missing},
        "work": work,
    }


def _metrics(tokenizer: Tokenizer, case: DecodeCase, c: Candidate, m: Measurement, staged: int) -> dict[str, Any]:
    """``staged``: how many of the last calls were timed by scale."""
    metrics: dict[str, Any] = {
        "provider": c.name,
        "dtype": str(c.dtype).removeprefix("torch."),
        "first_call_s": m.first_s if c.first_s is None else c.first_s,
        "max_error": m.max_error,
        "samples": [round(s, 7) for s in m.samples],
    }
    if case.kind == "decode":
        columns = zip(*c.staged.seconds[-staged:], strict=True)
        resolutions = resolutions_of(tokenizer.config)
        metrics["scales"] = {str(r): [round(x, 7) for x in xs] for r, xs in zip(resolutions, columns, strict=True)}
    return metrics


def compile_all(stack: contextlib.ExitStack, cases: Sequence[DecodeCase], device: torch.device) -> list[Compiled]:
    """torch.compile of all cases at once, in processes that live as long as ``stack``; or reasons why there is none."""
    dtype = str(compute_dtype(torch.bfloat16, device)[0]).removeprefix("torch.")
    arguments = [{"case": asdict(case), "device": str(device), "dtype": dtype} for case in cases]
    calls = [
        stack.enter_context(started("msdd_fast.bench.decode.models:compiled", a)) if case.compile_seconds else None
        for case, a in zip(cases, arguments, strict=True)
    ]

    def past_its_first(call: Isolated | None, limit: float) -> Compiled:
        if call is None:
            return None, "left out"
        try:
            return call.wait(limit), None
        except IsolatedError as error:
            call.end()  # or it would take time from those that are measured
            return None, f"torch.compile {error}"

    return [past_its_first(call, case.compile_seconds) for case, call in zip(cases, calls, strict=True)]


def work_of(tokenizer: Tokenizer, case: DecodeCase) -> dict[str, dict[str, int]]:
    """FLOP and bytes of the case by formula: "whole", and by scale. As the engine runs it, 2 bytes an element."""
    family = family_of(tokenizer.config)
    if case.kind == "encode":
        parts = {"whole": family.encode_work(case.batch)}
    else:
        work = family.decode_work(case.batch, case.steps, case.cfg_scale)
        scales = sorted({w.scale for w in work} - {0})
        parts = {"whole": work} | {str(s): [w for w in work if w.scale == s] for s in scales}
    return {name: {"flops": total(w).flops, "bytes": total(w).bytes} for name, w in parts.items()}


def run_suite(
    cases: Iterable[DecodeCase],
    device: torch.device,
    rounds: int = ROUNDS,
    with_cold_start: bool = True,
    waterfall_of: str | None = None,
    progress: Callable[[dict[str, Any]], None] = lambda _: None,
    note: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """The document of a run: machine, ceilings, cases, cold start.

    ``waterfall_of``: a model whose waterfall at batch 1 becomes part of the document. ``progress`` gets the result of
    each case; ``note`` gets a message before each long wait.
    """
    results: list[dict[str, Any]] = []
    cases, at_once = list(cases), min(os.cpu_count() or 1, AT_ONCE)
    tokenizer, loaded = None, None
    for begin in range(0, len(cases), at_once):
        group = cases[begin : begin + at_once]
        compiling = [case.name for case in group if case.compile_seconds]
        if compiling:
            note(f"torch.compile of {' and of '.join(compiling)} ...")
        with contextlib.ExitStack() as stack:
            for case, other in zip(group, compile_all(stack, group, device), strict=True):
                if tokenizer is None or case.model != loaded:
                    tokenizer, loaded = load(case.model, device), case.model
                results.append(measure_case(tokenizer, case, rounds, other))
                progress(results[-1])
    bars = None
    if waterfall_of:
        bars = {"model": waterfall_of, "results": [waterfall.measure(load(waterfall_of, device), 1, 7, False)]}
    dtypes = sorted({p["dtype"] for r in results for p in r["providers"]})
    return {
        "format": FORMAT,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": str(device.type),
        "machine": machine_info(),
        "ceilings": {"copy": copy_bandwidth(device), **{d: gemm_rate(device, getattr(torch, d)) for d in dtypes}},
        "cases": results,
        "waterfall": bars,
        "cold_start": cold_start(device) if with_cold_start else None,
    }
