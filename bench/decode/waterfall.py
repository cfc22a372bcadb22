"""Where the speed comes from: the same decode with one measure after the other, in one interleaved run.

    python -m msdd_fast.bench.decode.waterfall msdd-nano --batch-size 1 8 [--json FILE]

Each bar has everything before it: eager-bf16 (the eager tokenizer in bfloat16, no op of ours, nothing hoisted), the
engine's compute dtype, hoisting and packing, fused ops, attention, and on a GPU the CUDA graph: the exact tier.

For comparison: the fast tier (int8 products on a CPU, float8 on a GPU) with its expected loss of PSNR, torch.compile of
eager in bfloat16 and in the compute dtype, and the engine's matrix products and convolutions alone, with its shapes and
weights.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from msdd_fast.backends.extension import extension_status
from msdd_fast.bench.decode.models import (
    PLAIN_PYTORCH,
    SHORT,
    TOLERANCE,
    conditions,
    device_of,
    eager,
    load,
    random_latents,
)
from msdd_fast.bench.report.results import FAST, waterfall_notes
from msdd_fast.bench.report.text import aligned, error_text, number
from msdd_fast.bench.timing.clock import timer_for
from msdd_fast.bench.timing.harness import Measurement, Provider, close_to, compare
from msdd_fast.bench.timing.machine import machine_info
from msdd_fast.bench.timing.trace import count_launches
from msdd_fast.engine import FastDecoder, accelerate
from msdd_fast.engine.report import Accuracy
from msdd_fast.errors import AccuracyError, BackendUnavailableError, InputError
from msdd_fast.io.arguments import pick_device, positive_int, renamed
from msdd_fast.io.files import require_writable
from msdd_fast.io.json_files import write_json
from msdd_fast.io.program import run_program
from msdd_fast.layers.convolution import Convolution, Fused, Shortcut, UpsampleConvolution
from msdd_fast.layers.linear.dense import DenseLinear
from msdd_fast.tokenizer import Tokenizer

SDPA = "attention=sdpa,context_attention=sdpa"


def bare_products(engine: FastDecoder, z: Tensor) -> tuple[Callable[[], None], int]:
    """A function that runs all matrix products and convolutions of one decode, without norms and sums, and their FLOP.

    ``engine`` has no graphs: a replay calls no layers. The FLOP of linear layers and of the extension's convolutions
    are computed here, since PyTorch counts its own only. Calls of equal shapes share their inputs, since those of a
    U-Net at full resolution are large.
    """
    calls: list[tuple[Callable[..., Tensor], tuple[Any, ...]]] = []
    flops = 0
    inputs: dict[Any, Tensor] = {}
    kinds = (DenseLinear, Shortcut, Convolution, UpsampleConvolution, Fused)
    originals = [kind.__call__ for kind in kinds]

    def like(t: Tensor, use: str) -> Tensor:
        key = (t.shape, t.stride(), t.dtype, use)
        return inputs.setdefault(key, torch.randn_like(t))

    def recorder(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def record(self: Any, x: Tensor, out: Tensor | None = None, *more: Any) -> Tensor:
            nonlocal flops
            y = original(self, x) if out is None else original(self, x, out, *more)
            flops += 2 * x.numel() * self.features if isinstance(self, DenseLinear) else 0
            calls.append((self, (like(x, "x"),) if out is None else (like(x, "x"), like(y, "out"), *more)))
            return y

        return record

    def record_fused(self: Fused, maps: Any, norm: Any = None, silu: bool = False, added: Any = ()) -> Tensor:
        nonlocal flops
        y = original_fused(self, maps, norm, silu, added)
        added = added if self.has_shortcut else ()
        taps = 4 if self.kind == "up" else 9
        flops += 2 * y.numel() * (taps * self.in_channels + sum(x.shape[1] for x in added))
        shared, also = ([like(x, f"map {i}") for i, x in enumerate(xs)] for xs in (maps, added))
        calls.append((self, (shared, None, False, also)))
        return y

    original_fused = Fused.__call__
    for kind, original in zip(kinds, originals, strict=True):
        kind.__call__ = record_fused if kind is Fused else recorder(original)  # type: ignore[method-assign]
    try:
        engine.decode(z, **conditions(engine.config))
    finally:
        for kind, original in zip(kinds, originals, strict=True):
            kind.__call__ = original  # type: ignore[method-assign]

    def run() -> None:
        with torch.no_grad():
            for call, arguments in calls:
                call(*arguments)

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for call, arguments in calls:
            if not isinstance(call, (DenseLinear, Fused)):
                call(*arguments)
    return run, flops + int(counter.get_total_flops())


@dataclass
class Bars:
    """The bars of one batch size, the exact engine without graphs; the fast tier's accuracy or why it is missing."""

    providers: list[Provider]
    plain: FastDecoder
    z: Tensor
    fast: Accuracy | str


def bars_of(tokenizer: Tokenizer, batch: int, with_compile: bool, steps: int | None = None) -> Bars:
    """Every way to run the decode of a random batch; ``steps`` defaults to the config's."""
    device = device_of(tokenizer)
    z = random_latents(tokenizer.config, batch, device)
    fused = "triton" if device.type == "cuda" else "cpu" if extension_status()[0] else "eager"
    steps = tokenizer.config.sampling.steps if steps is None else steps
    options: dict[str, Any] = dict(batch_sizes=(batch,), graphs=False, steps=steps)
    best = accelerate(tokenizer, **{**options, "graphs": "auto"})
    bars: dict[str, Callable[[Tensor], Tensor]] = {"eager-bf16": partial(eager(tokenizer, torch.bfloat16), steps=steps)}
    if best.dtype != torch.bfloat16:
        bars[f"eager-{SHORT[best.dtype]}"] = partial(eager(tokenizer, best.dtype), steps=steps)
    bars["hoist"] = accelerate(tokenizer, backend=f"{PLAIN_PYTORCH},stage_transition=auto", **options).decode
    with_sdpa = accelerate(tokenizer, backend=f"{fused},{SDPA}", **options)
    if fused != "eager":  # else no fused op is here, and the bar would be "hoist" once more
        bars["fused ops"] = with_sdpa.decode
    plain = accelerate(tokenizer, **options)
    if any(choice.backend == "sdpa" for choice in with_sdpa.report().ops):
        bars["attention"] = plain.decode
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
            bars[f"compile-{SHORT[dtype]}"] = partial(eager(tokenizer, dtype, compiled=True), steps=steps)
    return Bars(
        [Provider(name, partial(decode, z, **conditions(tokenizer.config))) for name, decode in bars.items()],
        plain,
        z,
        accuracy,
    )


def measure(
    tokenizer: Tokenizer, batch: int, rounds: int, with_compile: bool = True, steps: int | None = None
) -> dict[str, Any]:
    """One waterfall as plain data."""
    found = bars_of(tokenizer, batch, with_compile, steps)
    bars, z = found.providers, found.z
    products, flops = bare_products(found.plain, z)
    check = close_to(tokenizer.decode(z, steps=steps, **conditions(tokenizer.config)), TOLERANCE)
    results = compare(
        [*bars, Provider("bare matmuls", products)],
        lambda name, out: None if name == "bare matmuls" else check(name, out),
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
    rows = [["", "ms", "img/s", "x", "GFLOP/s", "error", "launches", "GB"]]
    for r in result["rows"]:
        counted = [str(r["launches"]), f"{r['bytes'] / 1e9:.2f}"] if "launches" in r else ["", ""]
        rows.append(
            [
                r["provider"],
                f"{r['median_s'] * 1e3:.1f}",
                number(r["images_per_second"]),
                f"{r['speedup']:.2f}",
                f"{r['matmul_gflops']:.0f}",
                error_text(r["max_error"]),
                *counted,
            ]
        )
    return "\n".join([*aligned(rows), *waterfall_notes(result)])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--batch-size", type=positive_int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=positive_int, default=7)
    parser.add_argument("--steps", type=positive_int, help="default: the config's")
    parser.add_argument("--device", help="torch device (default: cuda if there is one, else cpu)")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(renamed(sys.argv[1:] if arguments is None else arguments, {"--batch": "--batch-size"}))
    if args.json:
        require_writable(args.json)
    tokenizer = load(args.model, pick_device(args.device))
    results = []
    for batch in args.batch_size:
        results.append(measure(tokenizer, batch, args.rounds, not args.no_compile, args.steps))
        print(f"{args.model}, batch {batch}\n{table(results[-1])}\n", flush=True)
    if args.json:
        write_json(args.json, {"model": args.model, "machine": machine_info(), "results": results}, indent=1)


if __name__ == "__main__":
    sys.exit(run_program(main))
