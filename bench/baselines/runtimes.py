"""The engine beside what else a CPU user would run a decoder with: OpenVINO and ONNX Runtime, in one run.

    pip install 'msdd-fast[runtimes]'
    python -m msdd_fast.bench.baselines.runtimes msdd-nano --batch-size 1 8 [--json FILE]

OpenVINO converts the velocity network of every scale and compiles it with the hint LATENCY, in float32 and in
bfloat16; ONNX Runtime runs the float32 export of ``torch.onnx``. Both are timed on the network alone, one evaluation
per scale with the time constant, in as many threads as PyTorch has; the engine and plain PyTorch on whole decodes, with
noise, sampler and the conversion to pixels. Every network's velocities are checked against PyTorch's before anything is
timed. All take turns.
"""

from __future__ import annotations

import argparse
import io
import logging
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from msdd_fast.backends import use_backend
from msdd_fast.bench.decode.models import PLAIN_PYTORCH, SHORT, eager, load, random_latents
from msdd_fast.bench.report.text import aligned, error_text, number
from msdd_fast.bench.timing.clock import CpuTimer
from msdd_fast.bench.timing.harness import Provider, WrongResultError, compare
from msdd_fast.bench.timing.machine import machine_info
from msdd_fast.engine import accelerate
from msdd_fast.errors import BackendUnavailableError, InputError
from msdd_fast.io.arguments import positive_int
from msdd_fast.io.files import require_writable
from msdd_fast.io.json_files import write_json
from msdd_fast.io.program import run_program
from msdd_fast.tokenizer import Tokenizer

CPU = torch.device("cpu")
# Of a velocity, whose elements are a few units: products of bfloat16 round after every layer.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.5}
REST_S = 0.1
Network = Callable[[Tensor, Tensor], Tensor]
"""Velocity of a state and latents."""


class RestedTimer(CpuTimer):
    """Lets the threads of whoever ran before stop spinning, and wakes those of the provider, before it looks at the
    clock."""

    def seconds(self, function: Callable[[], Any], calls: int) -> float:
        time.sleep(REST_S)
        function()
        return super().seconds(function, calls)


class AtOneTime(nn.Module):
    """The decoder of one scale with the model time of its only step, in float32 and with plain PyTorch's ops."""

    time: Tensor

    def __init__(self, tokenizer: Tokenizer, stage: int) -> None:
        super().__init__()
        self.decoder: Any = tokenizer.decoder
        time = tokenizer.schedule.time_grid(stage, 1)[0][0]
        self.register_buffer("time", torch.as_tensor(float(time)), persistent=False)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        with use_backend(PLAIN_PYTORCH):
            velocity: Tensor = self.decoder(x, self.time.expand(len(x)), z)
        return velocity


def openvino(module: nn.Module, inputs: tuple[Tensor, ...], dtype: torch.dtype) -> Network:
    """``module`` compiled by OpenVINO. Raises BackendUnavailableError without it."""
    try:
        import openvino as ov
    except ImportError as error:
        raise BackendUnavailableError("OpenVINO is missing: pip install 'msdd-fast[runtimes]'") from error
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype],
        "INFERENCE_NUM_THREADS": str(torch.get_num_threads()),
    }
    with torch.no_grad():
        model = ov.convert_model(torch.export.export(module, inputs))
    request = ov.Core().compile_model(model, "CPU", options).create_infer_request()

    def run(x: Tensor, z: Tensor) -> Tensor:
        request.infer([x.numpy(), z.numpy()], share_inputs=True, share_outputs=True)
        return torch.from_numpy(request.get_output_tensor(0).data)

    return run


def onnx_runtime(module: nn.Module, inputs: tuple[Tensor, ...]) -> Network:
    """``module`` exported and run by ONNX Runtime, in float32. Raises BackendUnavailableError without it."""
    try:
        import onnxruntime as ort
        import onnxscript  # noqa: F401  # which torch.onnx needs
    except ImportError as error:
        raise BackendUnavailableError("ONNX Runtime is missing: pip install 'msdd-fast[runtimes]'") from error
    file: Any = io.BytesIO()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch.export's own
        torch.onnx.export(module, inputs, file, dynamo=True, verbose=False)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.log_severity_level = 3
    session = ort.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]

    def run(x: Tensor, z: Tensor) -> Tensor:
        values = dict(zip(names, (x.numpy(), z.numpy()), strict=True))
        return torch.from_numpy(session.run(None, values)[0])

    return run


def networks(tokenizer: Tokenizer, z: Tensor) -> list[tuple[AtOneTime, tuple[Tensor, Tensor]]]:
    """The network of every scale, with a state and the latents."""
    generator, found = torch.Generator().manual_seed(1), []
    for stage, shape in enumerate(tokenizer.config.stage_shapes(z.shape)):
        x = torch.randn(len(z), *shape, generator=generator)
        found.append((AtOneTime(tokenizer, stage).eval(), (x, z)))
    return found


def all_scales(name: str, parts: Sequence[tuple[Network, tuple[Tensor, Tensor]]]) -> Provider:
    """One evaluation per scale."""
    return Provider(name, lambda: [run(*inputs) for run, inputs in parts])


ENGINES = {f"{kind}-{SHORT[dtype]}": dtype for dtype in (torch.float32, torch.bfloat16) for kind in ("engine", "eager")}
MAKERS: dict[str, Callable[..., Network]] = {
    "openvino-fp32": partial(openvino, dtype=torch.float32),
    "openvino-bf16": partial(openvino, dtype=torch.bfloat16),
    "onnxruntime-fp32": onnx_runtime,
}


def providers_of(
    tokenizer: Tokenizer, batch: int, only: Sequence[str]
) -> tuple[list[Provider], list[Tensor], list[str]]:
    """Those of ``only`` to time, the velocities that networks must give, and what is missing."""
    z = random_latents(tokenizer.config, batch, CPU)
    scales = networks(tokenizer, z)
    with torch.no_grad():
        expected = [module(*inputs) for module, inputs in scales]
    providers, missing = [], []
    for name, dtype in ENGINES.items():
        if name not in only:
            continue
        engine = accelerate(tokenizer, dtype=dtype, batch_sizes=(batch,))
        if engine.dtype == dtype:
            decode = engine.decode if name.startswith("engine") else eager(tokenizer, dtype)
            providers.append(Provider(name, partial(decode, z)))
    for name, make in MAKERS.items():
        if name not in only:
            continue
        try:
            providers.append(all_scales(name, [(make(module, inputs), inputs) for module, inputs in scales]))
        except BackendUnavailableError as error:
            missing.append(f"{name}: {error}")
    return providers, expected, missing


def checker(expected: Sequence[Tensor]) -> Callable[[str, Any], float | None]:
    """Largest error of a network's velocities; None for images."""

    def check(name: str, out: Any) -> float | None:
        if isinstance(out, Tensor):
            return None
        error = max(float((a - b).abs().max()) for a, b in zip(out, expected, strict=True))
        limit = TOLERANCES[torch.bfloat16 if "bf16" in name else torch.float32]
        if not error <= limit:
            raise WrongResultError(f"{name}: velocities differ by {error:.2g}, more than {limit:g}")
        return error

    return check


def measure(tokenizer: Tokenizer, batch: int, rounds: int, only: Sequence[str]) -> dict[str, Any]:
    """Medians of the providers, as plain data."""
    providers, expected, missing = providers_of(tokenizer, batch, only)
    results = compare(providers, checker(expected), RestedTimer(), rounds, warmup=2)
    rows = [
        {
            "provider": m.provider,
            "what": "network only" if m.max_error is not None else "whole decode",
            "median_s": m.median,
            "p10_s": m.quantile(0.1),
            "p90_s": m.quantile(0.9),
            "images_per_second": batch / m.median,
            "max_error": m.max_error,
        }
        for m in results.values()
    ]
    return {"batch": batch, "rows": rows, "missing": missing}


def table(result: dict[str, Any]) -> str:
    """Text of one batch size."""
    lines = [["", "what", "ms", "p90 ms", "img/s", "velocity error"]]
    for r in result["rows"]:
        error = "" if r["max_error"] is None else error_text(r["max_error"])
        times = [f"{r[key] * 1e3:.1f}" for key in ("median_s", "p90_s")]
        lines.append([r["provider"], r["what"], *times, number(r["images_per_second"]), error])
    return "\n".join([*aligned(lines), *result["missing"]])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--batch-size", type=positive_int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=positive_int, default=15)
    names = [*ENGINES, *MAKERS]
    parser.add_argument("--only", choices=names, nargs="+", default=names, help="what to time (default: everything)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    if args.json:
        require_writable(args.json)
    tokenizer = load(args.model, CPU)
    if tokenizer.config.sampling.steps != 1:
        raise InputError(f"model must take one step per scale, got {tokenizer.config.sampling.steps}")
    results = []
    for batch in args.batch_size:
        results.append(measure(tokenizer, batch, args.rounds, args.only))
        print(f"{args.model}, batch {batch}\n{table(results[-1])}\n", flush=True)
    if args.json:
        write_json(args.json, {"model": args.model, "machine": machine_info(), "results": results}, indent=1)


if __name__ == "__main__":
    sys.exit(run_program(main))
