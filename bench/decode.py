"""img/s of whole decodes, of each scale and of encodes, for every provider, in interleaved rounds.

Providers: ``eager-bf16`` (plain PyTorch in bfloat16, nothing hoisted), plain PyTorch and ``torch.compile`` of it in the
engine's compute dtype, and the engine in each of its tiers.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from msdd_fast.backends import use_backend
from msdd_fast.bench import waterfall
from msdd_fast.bench.ceilings import copy_bandwidth, gemm_rate
from msdd_fast.bench.coldstart import cold_start
from msdd_fast.bench.harness import Measurement, Provider, close_to, compare
from msdd_fast.bench.machine import machine_info
from msdd_fast.bench.roofline import decode_work, encode_work, total
from msdd_fast.bench.scales import PLAIN_PYTORCH
from msdd_fast.bench.timing import WallTimer, now
from msdd_fast.bench.waterfall import TOLERANCE, eager, in_dtype, load
from msdd_fast.engine import FastDecoder, accelerate
from msdd_fast.engine.compute import compute_dtype
from msdd_fast.engine.fast_decoder import TIERS
from msdd_fast.errors import BackendUnavailableError, InputError
from msdd_fast.models.tokenizer import Tokenizer

FORMAT = "msdd-fast bench 1"
ROUNDS = 200
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# Every scale, conditional and not, is a graph of its own: more than Dynamo compiles of one function by default.
RECOMPILE_LIMIT = 64

Mark = Callable[[], None]


@dataclass(frozen=True)
class DecodeCase:
    """One line of the table. ``kind``: "decode" or "encode"; ``seconds`` bound the timing, not the preparation."""

    model: str
    batch: int = 1
    steps: int = 1
    cfg_scale: float = 1.0
    kind: str = "decode"
    seconds: float = 20.0
    with_compile: bool = True

    @property
    def name(self) -> str:
        if self.kind == "encode":
            return f"{self.model} encode, batch {self.batch}"
        steps = f"{self.steps} step{'s' * (self.steps > 1)}"
        return f"{self.model} decode, batch {self.batch}, {steps}, CFG {self.cfg_scale:g}"


def standard() -> list[DecodeCase]:
    """What two CPU cores do in under ten minutes."""
    nano = [DecodeCase("msdd-nano", batch, kind=kind) for batch in (1, 8) for kind in ("decode", "encode")]
    return [*nano, *(DecodeCase(name, seconds=30.0) for name in ("msdd-d12-joint", "msdd-d12"))]


def full() -> list[DecodeCase]:
    """For a GPU: the standard models and the 3-scale and single-scale ones, all batches, teachers with guidance too."""
    names = ("msdd-nano", "msdd-d12", "msdd-d12-joint", "msdd-d12-joint-3scale", "msdd-d12-single-scale")
    settings = itertools.product(names, (1, 8, 64), ((1, 1.0), (1, 2.0), (30, 1.0), (30, 2.0)))
    decodes = [DecodeCase(name, batch, steps, cfg) for name, batch, (steps, cfg) in settings]
    return [*decodes, *(DecodeCase(name, batch, kind="encode") for name in names[:3] for batch in (1, 8, 64))]


def gate() -> list[DecodeCase]:
    """Little enough for every change: at most a minute."""
    return [
        DecodeCase("msdd-nano", 1, seconds=12, with_compile=False),
        DecodeCase("msdd-nano", 8, seconds=16, with_compile=False),
        DecodeCase("msdd-nano", 1, kind="encode", seconds=5, with_compile=False),
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

    With graphs it is ``stream``, one graph for each scale, which also makes each scale's clean estimate.
    """
    if engine.graphs:
        images = z
        for piece in engine.stream(z):
            images = piece.images
            mark()
        return images
    with torch.no_grad():
        inputs, guided = engine._inputs(z, 0, None), engine._is_guided(None)
        stages = engine.program.stages(inputs, guided)
        for _ in range(engine.config.schedule.num_stages - 1):
            next(stages)
            mark()
        images = engine.program.final(next(stages), inputs, torch.float32)
    mark()
    return images


@dataclass(frozen=True)
class Candidate:
    """One provider of a case: ``whole`` without marks, ``marked`` with one after each scale."""

    name: str
    dtype: torch.dtype
    whole: Callable[[], Tensor]
    marked: Lapped


def candidates(tokenizer: Tokenizer, case: DecodeCase) -> tuple[list[Candidate], dict[str, str], Callable[[], Tensor]]:
    """Providers, the reasons why others are missing, and the float32 reference."""
    cfg, device = tokenizer.config, next(tokenizer.parameters()).device
    generator = torch.Generator().manual_seed(0)
    dtype = compute_dtype(torch.bfloat16, device)[0]
    dtypes = list(dict.fromkeys((torch.bfloat16, dtype)))
    missing: dict[str, str] = {}
    found: list[Candidate] = []
    if not case.with_compile:
        missing["compile"] = "left out"
    if case.kind == "encode":
        images = torch.rand(case.batch, 3, cfg.image_size, cfg.image_size, generator=generator).to(device) * 2 - 1
        for d in dtypes:
            run = _encode(in_dtype(tokenizer, d), images.to(d))
            found.append(Candidate(f"eager-{SHORT[d]}", d, run, Lapped(_unmarked(run))))
        if case.with_compile:
            model = in_dtype(tokenizer, dtype, copy=True)
            model.encoder.compile(dynamic=False)
            run = _encode(model, images.to(dtype))
            found.append(Candidate(f"compile-{SHORT[dtype]}", dtype, run, Lapped(_unmarked(run))))
        return found, missing, _encode(tokenizer, images)
    z = torch.randn(case.batch, cfg.num_latent_tokens, cfg.latent_dim, generator=generator).to(device)
    options: dict[str, Any] = {"steps": case.steps, "cfg_scale": case.cfg_scale}
    kinds = [(d, False) for d in dtypes] + ([(dtype, True)] if case.with_compile else [])
    for d, compiled in kinds:
        decode = eager(tokenizer, d, compiled)
        marked = Lapped(lambda mark, f=decode: f(z, **options, stage_callback=lambda _: mark()))  # type: ignore[misc]
        name = f"{'compile' if compiled else 'eager'}-{SHORT[d]}"
        found.append(Candidate(name, d, lambda f=decode: f(z, **options), marked))  # type: ignore[misc]
    for tier in TIERS:
        try:
            engine = accelerate(tokenizer, tier=tier, batch_sizes=(case.batch,), **options)
            engine.decode(z)
        except (BackendUnavailableError, InputError) as error:
            missing[f"engine-{tier}"] = str(error)
            continue
        marked = Lapped(lambda mark, e=engine: engine_stages(e, z, mark))  # type: ignore[misc]
        found.append(Candidate(f"engine-{tier}", engine.dtype, lambda e=engine: e.decode(z), marked))  # type: ignore[misc]
    return found, missing, lambda: eager(tokenizer, torch.float32)(z, **options)


def measure_case(tokenizer: Tokenizer, case: DecodeCase, rounds: int = ROUNDS) -> dict[str, Any]:
    """All providers of one case as plain data; samples are seconds of one call.

    On a CPU the marks between scales cost nothing, so that one run gives the whole and its scales. On a GPU each mark
    waits for the device: there the scales are timed in a second run.
    """
    cuda = next(tokenizer.parameters()).device.type == "cuda"
    with _fresh_compiler() if case.with_compile else contextlib.nullcontext():
        found, missing, reference = candidates(tokenizer, case)
        near = close_to(reference(), TOLERANCE)
        first: dict[str, float] = {}
        for c in found:
            begin = now()
            (c.whole if cuda else c.marked)()
            first[c.name] = now() - begin
        timer = WallTimer()
        marked = [Provider(c.name, c.marked) for c in found]
        whole = [Provider(c.name, c.whole) for c in found] if cuda else marked
        results = compare(whole, near, timer, rounds, warmup=0, seconds=case.seconds)
        if cuda and case.kind == "decode":
            compare(marked, near, timer, len(results[found[0].name].samples), warmup=1)
    return {
        "case": {"name": case.name, **asdict(case)},
        "providers": [_facts(tokenizer, case, c, results[c.name], first[c.name]) for c in found],
        "missing": missing,
        "work": work_of(tokenizer, case),
    }


@contextlib.contextmanager
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()  # compiled code of earlier cases counts towards the limit
    with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
        yield


def work_of(tokenizer: Tokenizer, case: DecodeCase) -> dict[str, dict[str, int]]:
    """FLOP and bytes of the case by formula: "whole", and by scale. As the engine runs it, 2 bytes an element."""
    if case.kind == "encode":
        parts = {"whole": encode_work(tokenizer.config, case.batch)}
    else:
        work = decode_work(tokenizer.config, case.batch, case.steps, case.cfg_scale)
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
) -> dict[str, Any]:
    """The document of a run: machine, ceilings, cases, cold start. ``progress`` gets each case's result.

    ``waterfall_of``: a model of which the document gets the waterfall too, at batch 1.
    """
    results: list[dict[str, Any]] = []
    for model, group in itertools.groupby(cases, key=lambda case: case.model):
        tokenizer = load(model, device)
        for case in group:
            results.append(measure_case(tokenizer, case, rounds))
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


def _facts(tokenizer: Tokenizer, case: DecodeCase, c: Candidate, m: Measurement, first: float) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "provider": c.name,
        "dtype": str(c.dtype).removeprefix("torch."),
        "first_call_s": first,
        "max_error": m.max_error,
        "samples": [round(s, 7) for s in m.samples],
    }
    if case.kind == "decode":
        laps = c.marked.laps[-len(m.samples) :]
        resolutions = map(tokenizer.config.stage_resolution, range(tokenizer.config.schedule.num_stages))
        facts["scales"] = {
            str(r): [round(x, 7) for x in xs] for r, xs in zip(resolutions, zip(*laps, strict=True), strict=True)
        }
    return facts


def _encode(tokenizer: Tokenizer, images: Tensor) -> Callable[[], Tensor]:

    def run() -> Tensor:
        with use_backend(PLAIN_PYTORCH):
            return tokenizer.encode(images).float()

    return run


def _unmarked(run: Callable[[], Tensor]) -> Callable[[Mark], Tensor]:
    return lambda _: run()
