"""Show where the time of a decode goes: kernels by time, with bytes, FLOP and the fraction of the measured roofline.

CUDA graphs are off, since they hide the kernels. docs/profiling.md walks through an example.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from msdd_fast.commands.arguments import add_sampling
from msdd_fast.commands.output import add_json, check_json, finish, say, steps
from msdd_fast.errors import BackendUnavailableError
from msdd_fast.io.arguments import DTYPES, dtype_name, pick_device, positive_int
from msdd_fast.io.files import atomic_write, require_writable

NCU = ("ncu", "--set", "full", "--target-processes", "all", "--launch-skip", "2", "--launch-count", "1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", default="msdd-nano", help="or a preset (default: %(default)s)")
    parser.add_argument("--device", help="torch device (default: cuda if there is one, else cpu)")
    parser.add_argument("--provider", choices=("engine", "eager"), default="engine", help="default: %(default)s")
    parser.add_argument("--batch-size", type=positive_int, default=1, help="images (default: 1)")
    parser.add_argument("--top", type=positive_int, default=20, metavar="N", help="rows of the table (default: 20)")
    parser.add_argument("--trace", metavar="FILE", help="write a Chrome trace (.json), for ui.perfetto.dev")
    parser.add_argument("--memory", action="store_true", help="also print the peak of allocated memory")
    add_json(parser, "the kernels")
    add_sampling(parser)
    op = parser.add_argument_group("one op alone, with its benchmark's inputs")
    op.add_argument("--op", metavar="NAME", help="profile this op instead of a decode")
    op.add_argument("--shape", default="1x256", metavar="BATCHxPIXELS", help="default: %(default)s")
    op.add_argument("--dtype", type=dtype_name, choices=DTYPES, help="default: the engine's compute dtype")
    op.add_argument("--backend", help="of the op or the engine (default: auto)")
    op.add_argument(
        "--ncu", action="store_true", help="run under Nsight Compute, or print its command if it is missing"
    )


def run(args: argparse.Namespace) -> None:
    import torch

    from msdd_fast.bench.decode import models
    from msdd_fast.bench.ops import suite
    from msdd_fast.bench.ops.one import one_op, parse_shape
    from msdd_fast.bench.timing import profile
    from msdd_fast.bench.timing.memory import memory
    from msdd_fast.bench.timing.profile_table import table
    from msdd_fast.engine import accelerate
    from msdd_fast.engine.compute import compute_dtype

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes a line for each start and stop
    check_json(args)
    if args.trace:
        require_writable(args.trace)
    if args.ncu:
        _nsight(args)
        return
    device = pick_device(args.device)
    dtype = getattr(torch, args.dtype) if args.dtype else compute_dtype(torch.bfloat16, device)[0]
    if args.op:
        batch, scale = parse_shape(args.shape)
        call = one_op(args.op, suite.Case(scale, dtype, batch, device), args.backend)
        with steps(args, 1) as step:
            step("profiling")
            found, profiler = profile.rows(call, device)
    else:
        tokenizer = models.load(args.checkpoint, device)
        z = models.random_latents(tokenizer.config, args.batch_size, device)
        sampling = {"steps": args.steps, "cfg_scale": args.cfg_scale}
        if args.provider == "engine":
            engine = accelerate(
                tokenizer,
                dtype=dtype,
                backend=args.backend or "auto",
                graphs=False,
                batch_sizes=(args.batch_size,),
                **sampling,
            )
            dtype = engine.dtype

            def call() -> object:
                return engine.decode(z, args.seed, **models.conditions(tokenizer.config))

            with steps(args, 1) as step:
                step("profiling")
                found, profiler = profile.rows(call, device)
        else:
            tokenizer = models.in_dtype(tokenizer, dtype)  # cast here: the layers named below must be those that run
            decode = models.eager(tokenizer, dtype)
            options = {name: value for name, value in sampling.items() if value is not None}

            def call() -> object:
                return decode(z, seed=args.seed, **options)

            with profile.named_layers(tokenizer.decoder), steps(args, 1) as step:
                step("profiling")
                found, profiler = profile.rows(call, device)
    say(args, *table(found, device, dtype, args.top))
    if args.memory:
        snapshot = Path(args.trace).with_suffix(".memory.pickle") if args.trace and device.type == "cuda" else None
        say(args, memory(call, device, snapshot))
    if args.trace:
        with atomic_write(args.trace) as temporary:
            profiler.export_chrome_trace(str(temporary))
        say(args, f"wrote {args.trace}: open it at https://ui.perfetto.dev")
    finish(args, {"device": str(device), "dtype": str(dtype).removeprefix("torch."), "kernels": [*map(asdict, found)]})


def _nsight(args: argparse.Namespace) -> None:
    """Run this command without --ncu under Nsight Compute; print it if that is not installed."""
    mine = [sys.executable, "-m", "msdd_fast", *(word for word in sys.argv[1:] if word != "--ncu")]
    command = [*NCU, *mine]
    if shutil.which("ncu") is None:
        print(" ".join(command))
        raise BackendUnavailableError("--ncu needs Nsight Compute (ncu) on the PATH; the command is above")
    subprocess.run(command, check=True)
