"""img/s of whole decodes, of each scale and of encodes, for every provider, in interleaved rounds.

Providers: ``eager-bf16`` (plain PyTorch in bfloat16, nothing hoisted), plain PyTorch and ``torch.compile`` of it in the
engine's compute dtype, and the engine in each of its tiers. torch.compile runs in a process of its own (isolated.py),
which is ended where its first call takes longer than the case allows; the table then says so.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from msdd_fast.backends import use_backend
from msdd_fast.bench.decode import waterfall
from msdd_fast.bench.decode.coldstart import cold_start
from msdd_fast.bench.decode.scales import PLAIN_PYTORCH, resolutions_of
from msdd_fast.bench.decode.waterfall import TOLERANCE, eager, in_dtype, load
from msdd_fast.bench.timing.ceilings import copy_bandwidth, gemm_rate
from msdd_fast.bench.timing.clock import WallTimer, now
from msdd_fast.bench.timing.harness import MIN_ROUNDS, Measurement, Provider, close_to, compare
from msdd_fast.bench.timing.isolated import Isolated, IsolatedError, started
from msdd_fast.bench.timing.machine import machine_info
from msdd_fast.bench.work.roofline import decode_work, encode_work, total
from msdd_fast.bench.work.ssdd_roofline import ssdd_decode_work
from msdd_fast.engine import FastDecoder, accelerate
from msdd_fast.engine.compute import compute_dtype
from msdd_fast.engine.decoder import TIERS
from msdd_fast.errors import AccuracyError, BackendUnavailableError, InputError
from msdd_fast.families import family_of
from msdd_fast.families.msdd.config import TokenizerConfig
from msdd_fast.families.ssdd.config import SSDDConfig
from msdd_fast.tokenizer import Tokenizer

FORMAT = "msdd-fast bench 1"
ROUNDS = 200
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# On a CPU a deeper decoder is compiled block by block: the C++ of a whole network for every scale takes minutes.
WHOLE_DEPTH = 2
# A compilation keeps about one core busy, and has a model of its own in memory.
AT_ONCE = 6

Mark = Callable[[], None]
Compiled = tuple[Isolated | None, str | None]
"""torch.compile of a case, or the reason why it is missing."""


@dataclass(frozen=True)
class DecodeCase:
    """One table. ``kind``: "decode" or "encode".

    ``seconds``: of timing for each provider, from its ``min_rounds``-th round on; preparation comes on top.
    ``compile_seconds``: until torch.compile must have made its first call; 0 leaves it out.
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
    """What two CPU cores do in under ten minutes: there bfloat16 takes twenty seconds for one decode of 12 layers."""
    nano = [DecodeCase("msdd-nano", batch, seconds=4.0, compile_seconds=150.0) for batch in (1, 8)]
    encodes = [replace(case, kind="encode", seconds=3.0, compile_seconds=0.0) for case in nano]
    names = ("msdd-d12-joint", "msdd-d12")
    large = [DecodeCase(name, seconds=6.0, min_rounds=1, compile_seconds=240.0) for name in names]
    return [*nano, *encodes, *large]


def full() -> list[DecodeCase]:
    """For a GPU: the standard models and the 3-scale and single-scale ones, all batches, teachers with guidance too."""
    names = ("msdd-nano", "msdd-d12", "msdd-d12-joint", "msdd-d12-joint-3scale", "msdd-d12-single-scale")
    settings = itertools.product(names, (1, 8, 64), ((1, 1.0), (1, 2.0), (30, 1.0), (30, 2.0)))
    decodes = [DecodeCase(name, batch, steps, cfg, compile_seconds=900.0) for name, batch, (steps, cfg) in settings]
    encodes = [
        DecodeCase(name, batch, kind="encode", compile_seconds=900.0) for name in names[:3] for batch in (1, 8, 64)
    ]
    return [*decodes, *encodes]


def gate() -> list[DecodeCase]:
    """Little enough for every change: at most a minute."""
    return [
        DecodeCase("msdd-nano", 1, seconds=4.0, compile_seconds=0.0),
        DecodeCase("msdd-nano", 8, seconds=5.0, compile_seconds=0.0),
        DecodeCase("msdd-nano", 1, kind="encode", seconds=2.0, compile_seconds=0.0),
    ]


SUITES: dict[str, Callable[[], list[DecodeCase]]] = {"standard": standard, "full": full, "gate": gate}


class Lapped:
    """A call that notes when each scale is done: ``laps`` has one list of seconds per call."""

    def __init__(self, run: Callable[[Mark], Tensor]) -> None:
        self.run = run
        self.laps: list[list[float]] = []

    def __call__(self) -> Tensor:
        marks = [now()]
        out = self.run(lambda: marks.append(now()))
        self.laps.append([b - a for a, b in itertools.pairwise(marks)])
        return out


def engine_stages(engine: FastDecoder, z: Tensor, mark: Mark) -> Tensor:
    """A decode of the engine with a mark after every scale.

    With graphs it is ``stream``, one graph for each scale, which also makes each scale's clean estimate; so it is with
    a single scale, where that costs nothing.
    """
    if engine.graphs or engine.config.schedule.num_stages == 1:
        images = z
        for piece in engine.stream(z):
            images = piece.images
            mark()
        return images
    with torch.no_grad():
        inputs, guided = engine._inputs(z, 0, None), engine._is_guided(None)
        program: Any = engine.program
        stages = program.stages(inputs, guided)
        for _ in range(engine.config.schedule.num_stages - 1):
            next(stages)
            mark()
        images = program.final(next(stages), inputs, torch.float32)
    mark()
    return images


@dataclass(frozen=True)
class Candidate:
    """One provider of a case: ``whole`` without marks, ``marked`` with one after each scale."""

    name: str
    dtype: torch.dtype
    whole: Callable[[], Tensor]
    marked: Lapped
    clock: Callable[[bool], float] | None = None
    """Seconds of one more call, with marks or without, where another process makes it."""
    first_s: float | None = None

    def provider(self, marked: bool) -> Provider:
        """For ``compare``."""
        clock = None if self.clock is None else functools.partial(self.clock, marked)
        return Provider(self.name, self.marked if marked else self.whole, clock)


def inputs_of(tokenizer: Tokenizer, case: DecodeCase) -> Tensor:
    """Latents to decode or images to encode: the same random numbers in every process."""
    cfg, device = tokenizer.config, next(tokenizer.parameters()).device
    generator = torch.Generator().manual_seed(0)
    if case.kind == "encode":
        if cfg.family == "ssdd":
            raise InputError(f"kind must be decode for {case.model}: its encoder is plain convolutions, got encode")
        return torch.rand(case.batch, 3, cfg.image_size, cfg.image_size, generator=generator).to(device) * 2 - 1
    return torch.randn(case.batch, *family_of(cfg).example, generator=generator).to(device)


def plain(
    tokenizer: Tokenizer, case: DecodeCase, dtype: torch.dtype, compiled: bool = False
) -> Callable[[Mark], Tensor]:
    """The case in plain PyTorch, or in ``torch.compile`` of that; marks after each scale."""
    inputs = inputs_of(tokenizer, case)
    if case.kind == "encode":
        encode = eager_encode(tokenizer, dtype, compiled)
        return lambda _: encode(inputs)
    decode = eager(tokenizer, dtype, compiled, by_block(tokenizer))
    return lambda mark: decode(inputs, steps=case.steps, cfg_scale=case.cfg_scale, stage_callback=lambda _: mark())


def compiled(case: dict[str, Any], device: str, dtype: str) -> Callable[[Mark], Tensor]:
    """``plain`` with torch.compile, from plain data: what the process of ``isolated`` runs."""
    wanted = DecodeCase(**case)
    return plain(load(wanted.model, torch.device(device)), wanted, getattr(torch, dtype), compiled=True)


def by_block(tokenizer: Tokenizer) -> bool:
    """Whether torch.compile takes the blocks of this decoder one by one: see WHOLE_DEPTH."""
    cpu, config = next(tokenizer.parameters()).device.type == "cpu", tokenizer.config
    return cpu and isinstance(config, TokenizerConfig) and config.decoder.depth > WHOLE_DEPTH


def candidates(
    tokenizer: Tokenizer, case: DecodeCase, compiler: str, other: Isolated | None
) -> tuple[list[Candidate], dict[str, str]]:
    """Providers, and the reasons why others are missing; ``other``: the process of the provider ``compiler``."""
    device = next(tokenizer.parameters()).device
    dtype = compute_dtype(torch.bfloat16, device)[0]
    missing: dict[str, str] = {}
    found: list[Candidate] = []
    for d in dict.fromkeys((torch.bfloat16, dtype)):
        run = plain(tokenizer, case, d)
        found.append(Candidate(f"eager-{SHORT[d]}", d, lambda f=run: f(_ignore), Lapped(run)))  # type: ignore[misc]
    if other is not None:
        found.append(_elsewhere(compiler, dtype, other))
    if case.kind == "encode":
        return found, missing
    z = inputs_of(tokenizer, case)
    for tier in TIERS:
        try:
            engine = accelerate(
                tokenizer, tier=tier, batch_sizes=(case.batch,), steps=case.steps, cfg_scale=case.cfg_scale
            )
        except (AccuracyError, BackendUnavailableError, InputError) as error:
            missing[f"engine-{tier}"] = str(error)
            continue
        marked = Lapped(lambda mark, e=engine: engine_stages(e, z, mark))  # type: ignore[misc]
        found.append(Candidate(f"engine-{tier}", engine.dtype, lambda e=engine: e.decode(z), marked))  # type: ignore[misc]
    return found, missing


def _elsewhere(name: str, dtype: torch.dtype, other: Isolated) -> Candidate:
    """A provider whose calls another process makes and times; its first call has been made."""
    marked = Lapped(lambda _: other.result)

    def clock(with_marks: bool) -> float:
        *laps, rest = other.laps(with_marks)
        if with_marks:
            marked.laps.append(laps)
        return sum(laps) + rest

    return Candidate(name, dtype, lambda: other.result, marked, clock, other.first_s)


def _ignore() -> None:
    """A mark that nobody wants."""


def measure_case(
    tokenizer: Tokenizer, case: DecodeCase, rounds: int = ROUNDS, other: Compiled | None = None
) -> dict[str, Any]:
    """All providers of one case as plain data; samples are seconds of one call. ``other``: what ``compile_all`` gave.

    ``tokenizer`` is ``load(case.model)``: torch.compile has another copy of it. On a CPU the marks between scales cost
    nothing, so that one run gives the whole and its scales. On a GPU each mark waits for the device: there the scales
    are timed in a second run.
    """
    device = next(tokenizer.parameters()).device
    cuda = device.type == "cuda"
    with contextlib.ExitStack() as stack:
        name = f"compile-{SHORT[compute_dtype(torch.bfloat16, device)[0]]}"
        if case.kind == "decode" and by_block(tokenizer):
            name += " by block"
        call, reason = other or compile_all(stack, [case], device)[0]
        found, missing = candidates(tokenizer, case, name, call)
        near = close_to(plain(tokenizer, case, torch.float32)(_ignore), TOLERANCE)
        timer = WallTimer()
        whole = [c.provider(marked=not cuda) for c in found]
        parts = results = compare(whole, near, timer, rounds, 0, case.seconds, case.min_rounds)
        if cuda and case.kind == "decode":
            marked = [c.provider(marked=True) for c in found]
            parts = compare(marked, near, timer, rounds, 1, case.seconds, case.min_rounds)
    return {
        "case": {"name": case.name, **asdict(case)},
        "providers": [_facts(tokenizer, case, c, results[c.name], len(parts[c.name].samples)) for c in found],
        "missing": {**({name: reason} if reason else {}), **missing},
        "work": work_of(tokenizer, case),
    }


def compile_all(stack: contextlib.ExitStack, cases: Sequence[DecodeCase], device: torch.device) -> list[Compiled]:
    """torch.compile of all cases at once, in processes that live as long as ``stack``; or reasons why there is none."""
    dtype = str(compute_dtype(torch.bfloat16, device)[0]).removeprefix("torch.")
    arguments = [{"case": asdict(case), "device": str(device), "dtype": dtype} for case in cases]
    calls = [
        stack.enter_context(started("msdd_fast.bench.decode.suite:compiled", a)) if case.compile_seconds else None
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
    config = tokenizer.config
    if isinstance(config, SSDDConfig):
        parts = {"whole": ssdd_decode_work(config, case.batch, case.steps)}
        parts[str(config.image_size)] = [w for w in parts["whole"] if w.scale]
    elif case.kind == "encode":
        parts = {"whole": encode_work(config, case.batch)}
    else:
        work = decode_work(config, case.batch, case.steps, case.cfg_scale)
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
    """The document of a run: machine, ceilings, cases, cold start. ``progress`` gets each case's result, ``note`` what
    one waits for before that.

    ``waterfall_of``: a model of which the document gets the waterfall too, at batch 1.
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


def _facts(tokenizer: Tokenizer, case: DecodeCase, c: Candidate, m: Measurement, laps: int) -> dict[str, Any]:
    """``laps``: how many of the last calls were timed by scale."""
    facts: dict[str, Any] = {
        "provider": c.name,
        "dtype": str(c.dtype).removeprefix("torch."),
        "first_call_s": m.first_s if c.first_s is None else c.first_s,
        "max_error": m.max_error,
        "samples": [round(s, 7) for s in m.samples],
    }
    if case.kind == "decode":
        columns = zip(*c.marked.laps[-laps:], strict=True)
        resolutions = resolutions_of(tokenizer.config)
        facts["scales"] = {str(r): [round(x, 7) for x in xs] for r, xs in zip(resolutions, columns, strict=True)}
    return facts


def eager_encode(tokenizer: Tokenizer, dtype: torch.dtype, compiled: bool = False) -> Callable[[Tensor], Tensor]:
    """The plain encoder in ``dtype``, with none of our ops."""
    model = in_dtype(tokenizer, dtype, copy=compiled)
    if compiled:
        model.encoder.compile(dynamic=False)

    def encode(images: Tensor) -> Tensor:
        with use_backend(PLAIN_PYTORCH):
            return model.encode(images.to(dtype)).float()

    return encode
