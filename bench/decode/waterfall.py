"""Where the engine's speed comes from: img/s of one decode, one measure after the other, in one interleaved run.

    python -m msdd_fast.bench.decode.waterfall msdd-nano --batch 1 8 [--json FILE]

Bars, each with everything before it: eager-bf16 (the eager tokenizer in bfloat16, no op of ours, nothing hoisted), the
engine's compute dtype, hoisting and packing, fused ops, attention, and on a GPU the graph: the exact tier. Beside them
the fast tier (int8 products on a CPU, float8 on a GPU) with the PSNR that it is expected to lose, torch.compile of
eager-bf16 and of eager in the compute dtype, and the engine's matrix products and convolutions alone, timed
with its shapes and weights.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from msdd_fast.backends import use_backend
from msdd_fast.bench.decode.scales import PLAIN_PYTORCH
from msdd_fast.bench.timing.clock import timer_for
from msdd_fast.bench.timing.harness import Measurement, Provider, close_to, compare
from msdd_fast.bench.timing.machine import machine_info
from msdd_fast.bench.timing.trace import count_launches
from msdd_fast.engine import FastDecoder, accelerate
from msdd_fast.engine.report import Accuracy
from msdd_fast.errors import AccuracyError, BackendUnavailableError, CheckpointError, InputError
from msdd_fast.families import family_of
from msdd_fast.families.msdd.presets import PRESETS
from msdd_fast.families.ssdd.presets import SSDD_PRESETS
from msdd_fast.layers.convolution import Convolution, Shortcut, UpsampleConvolution
from msdd_fast.layers.linear.dense import DenseLinear
from msdd_fast.sampling import sample
from msdd_fast.tokenizer import Tokenizer

# bfloat16 eager differs from float32 by this much at most on decoded values of a few units.
TOLERANCE = 1.0
SDPA = "attention=sdpa,context_attention=sdpa"


def load(name: str, device: torch.device) -> Tokenizer:
    """A checkpoint, or a preset with random weights."""
    try:
        tokenizer = Tokenizer.from_pretrained(name)
    except CheckpointError:
        if name not in {**PRESETS, **SSDD_PRESETS}:
            raise
        torch.manual_seed(0)
        tokenizer = Tokenizer.from_config(name)
    return tokenizer.to(device)


def eager(
    tokenizer: Tokenizer, dtype: torch.dtype, compiled: bool = False, by_block: bool = False
) -> Callable[..., Tensor]:
    """The plain sampler and network in ``dtype``: no op of ours but the noise, and PyTorch's own attention.

    The eager noise is a reference for tests, made of integer operations; no sampler would use it. Our fast noise makes
    the baseline as strong as one with torch.randn, and its images comparable. Takes ``sample``'s options. ``by_block``:
    compile the blocks, which share their code, and not the network as a whole, which takes many times as long.
    """
    model = in_dtype(tokenizer, dtype, copy=compiled)
    if compiled:
        torch._dynamo.config.recompile_limit = 64  # a graph for every scale, batch and dtype of this run
        for module in model.decoder.blocks if by_block else [model.decoder]:
            module.compile(dynamic=False)
    sampling = tokenizer.config.sampling
    defaults = {"steps": sampling.steps, "cfg_scale": sampling.cfg_scale, "seed": 0}

    def decode(z: Tensor, **options: Any) -> Tensor:
        with use_backend(PLAIN_PYTORCH), torch.no_grad():
            out = sample(model.decoder, z.to(dtype), model.schedule, **{**defaults, **options})
        assert isinstance(out, Tensor)
        return out

    return decode


def in_dtype(tokenizer: Tokenizer, dtype: torch.dtype, copy: bool = False) -> Tokenizer:
    """The tokenizer with weights of ``dtype``: itself if it has them and ``copy`` is not set."""
    parameter = next(tokenizer.parameters())
    if parameter.dtype == dtype and not copy:
        return tokenizer
    model = Tokenizer.from_config(tokenizer.config).to(parameter.device, dtype)
    model.load_state_dict(tokenizer.state_dict())
    return model


def bare_products(engine: FastDecoder, z: Tensor) -> tuple[Callable[[], None], int]:
    """All matrix products and convolutions of one decode as a function, and their FLOP.

    Every shape once: a call holds its inputs, and those of a U-Net at full resolution are large.
    """
    calls: list[tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = []
    inputs: dict[Any, Tensor] = {}
    kinds = (DenseLinear, Shortcut, Convolution, UpsampleConvolution)
    originals = [kind.__call__ for kind in kinds]

    def like(t: Tensor, use: str) -> Tensor:
        key = (t.shape, t.stride(), t.dtype, use)
        return inputs.setdefault(key, torch.randn_like(t))

    def recorder(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def record(self: Any, x: Tensor, out: Tensor | None = None) -> Tensor:
            y = original(self, x) if out is None else original(self, x, out)
            calls.append((self, (like(x, "x"),) if out is None else (like(x, "x"), like(y, "out"))))
            return y

        return record

    for kind, original in zip(kinds, originals, strict=True):
        kind.__call__ = recorder(original)  # type: ignore[method-assign]
    try:
        engine.decode(z)
    finally:
        for kind, original in zip(kinds, originals, strict=True):
            kind.__call__ = original  # type: ignore[method-assign]

    def run() -> None:
        with torch.no_grad():
            for call, arguments in calls:
                call(*arguments)

    with FlopCounterMode(display=False) as counter:
        run()
    return run, int(counter.get_total_flops())


FAST = "engine-fast"


@dataclass
class Bars:
    """The bars of one batch size, the exact tier's engine, and the fast tier's accuracy or the reason why it is out."""

    providers: list[Provider]
    best: FastDecoder
    z: Tensor
    fast: Accuracy | str


def bars_of(tokenizer: Tokenizer, batch: int, with_compile: bool, steps: int | None = None) -> Bars:
    """Every way to run the decode of a random batch; ``steps`` defaults to the config's."""
    device, generator = next(tokenizer.parameters()).device, torch.Generator().manual_seed(0)
    z = torch.randn(batch, *family_of(tokenizer.config).example, generator=generator).to(device)
    fused = "triton" if device.type == "cuda" else "cpu"
    steps = tokenizer.config.sampling.steps if steps is None else steps
    options: dict[str, Any] = dict(batch_sizes=(batch,), graphs=False, steps=steps)
    best = accelerate(tokenizer, **{**options, "graphs": "auto"})
    bars: dict[str, Callable[[Tensor], Tensor]] = {"eager-bf16": partial(eager(tokenizer, torch.bfloat16), steps=steps)}
    if best.dtype != torch.bfloat16:
        bars[f"eager-{_short(best.dtype)}"] = partial(eager(tokenizer, best.dtype), steps=steps)
    bars["hoist"] = accelerate(tokenizer, backend=f"{PLAIN_PYTORCH},stage_transition=auto", **options).decode
    bars["fused ops"] = accelerate(tokenizer, backend=f"{fused},{SDPA}", **options).decode
    if tokenizer.config.family == "msdd":  # SSDD's attention is one of the fused ops
        bars["attention"] = accelerate(tokenizer, **options).decode
    if best.graphs:
        best.warmup()
        bars["graph"] = best.decode
    accuracy: Accuracy | str
    try:
        quick = accelerate(tokenizer, tier="fast", batch_sizes=(batch,), steps=steps)
        assert quick.accuracy is not None
        accuracy, bars[FAST] = quick.accuracy, quick.decode
    except (AccuracyError, BackendUnavailableError, InputError) as error:
        accuracy = str(error)
    if with_compile:
        for dtype in dict.fromkeys((torch.bfloat16, best.dtype)):
            bars[f"compile-{_short(dtype)}"] = partial(eager(tokenizer, dtype, compiled=True), steps=steps)
    return Bars([Provider(name, _call(decode, z)) for name, decode in bars.items()], best, z, accuracy)


def measure(
    tokenizer: Tokenizer, batch: int, rounds: int, with_compile: bool = True, steps: int | None = None
) -> dict[str, Any]:
    """One waterfall as plain data."""
    found = bars_of(tokenizer, batch, with_compile, steps)
    bars, z = found.providers, found.z
    products, flops = bare_products(found.best, z)
    reference = tokenizer.decode(z, steps=steps)
    near = close_to(reference, TOLERANCE)
    results = compare(
        [*bars, Provider("bare matmuls", products)],
        lambda name, out: None if name == "bare matmuls" else near(name, out),
        timer_for(z.device),
        rounds,
        warmup=1,
    )
    base = results["eager-bf16"]
    rows = [_row(m, base, batch, flops) for m in results.values()]
    for row, provider in zip(rows, bars, strict=False):
        if not row["provider"].startswith("compile"):
            row["launches"], row["bytes"] = count_launches(provider.function)
        if row["provider"] == FAST and isinstance(found.fast, Accuracy):
            row["expected_psnr_loss"] = found.fast.expected_loss
    missing = {FAST: found.fast} if isinstance(found.fast, str) else {}
    return {"batch": batch, "matmul_flop": flops, "rows": rows, "missing": missing}


def _row(m: Measurement, base: Measurement, batch: int, flops: int) -> dict[str, Any]:
    return {
        "provider": m.provider,
        "median_s": m.median,
        "p10_s": m.quantile(0.1),
        "p90_s": m.quantile(0.9),
        "images_per_second": batch / m.median,
        "speedup": m.speedup(base),
        "matmul_gflops": flops / m.median / 1e9,
        "max_error": m.max_error,
    }


def table(result: dict[str, Any]) -> str:
    """Text of one waterfall. Launches and bytes are counted, not measured (bench/timing/trace.py)."""
    lines = [f"{'':>16} {'ms':>9} {'img/s':>8} {'x':>6} {'GFLOP/s':>8} {'error':>8} {'launches':>8} {'GB':>7}"]
    for r in result["rows"]:
        error = "-" if r["max_error"] is None else f"{r['max_error']:.1e}"
        count = f"{r['launches']:>8} {r['bytes'] / 1e9:>7.2f}" if "launches" in r else ""
        lines.append(
            f"{r['provider']:>16} {r['median_s'] * 1e3:>9.1f} {r['images_per_second']:>8.2f} {r['speedup']:>6.2f} "
            f"{r['matmul_gflops']:>8.0f} {error:>8} {count}".rstrip()
        )
    return "\n".join([*lines, *notes(result)])


def notes(result: dict[str, Any]) -> list[str]:
    """What must be said beside the fast tier's bar, or why there is none."""
    losses = [r["expected_psnr_loss"] for r in result["rows"] if "expected_psnr_loss" in r]
    said = [f"{FAST} is not exact: int8 or float8 products, expected to cost {loss:.3f} dB of PSNR" for loss in losses]
    return said + [f"{name}: {why}" for name, why in result.get("missing", {}).items()]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, help="default: the config's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    tokenizer = load(args.model, torch.device(args.device))
    results = []
    for batch in args.batch:
        results.append(measure(tokenizer, batch, args.rounds, not args.no_compile, args.steps))
        print(f"{args.model}, batch {batch}\n{table(results[-1])}\n", flush=True)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        document = {"model": args.model, "machine": machine_info(), "results": results}
        args.json.write_text(json.dumps(document, indent=1) + "\n")


def _call(decode: Callable[[Tensor], Tensor], z: Tensor) -> Callable[[], Tensor]:
    return lambda: decode(z)


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


if __name__ == "__main__":
    main()
