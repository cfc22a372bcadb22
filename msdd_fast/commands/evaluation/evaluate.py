"""What `eval` does: measure the parts of a set of images that are missing, collect them and report."""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from msdd_fast import __version__
from msdd_fast.commands.bulk.eval import evaluate_on_ray
from msdd_fast.commands.bulk.options import LOCAL, ray_options
from msdd_fast.commands.evaluation.job import Job, list_inputs, machine, make_job
from msdd_fast.commands.evaluation.run import RECORD, PartFolder, Result, collect, measure_part, write_part
from msdd_fast.commands.evaluation.sources import Source
from msdd_fast.commands.inputs import report_unreadable
from msdd_fast.commands.output import bar, check_json, finish, say
from msdd_fast.errors import InputError
from msdd_fast.io.files import as_path, require_writable
from msdd_fast.training.loop.distributed import (
    on_all_ranks,
    on_rank0_and_broadcast,
    process_group,
    rank,
    world_size,
)

_DAYS = 7  # how long a process waits for the slowest one


def run(args: argparse.Namespace) -> None:
    ray = ray_options(args)
    check_arguments(args)
    size = os.environ.get("WORLD_SIZE")
    if ray is not None:
        if size is not None:
            raise InputError("--ray starts its workers itself: start it once, not with torchrun")
        if args.throughput is not None:
            raise InputError("--throughput is not for --ray: its workers share their machines")
        if args.out is None and ray.address != LOCAL:
            raise InputError("--ray ADDRESS needs --out, a folder that all nodes see")
        with _folder(args) as folder:
            report(args, *evaluate_on_ray(args, ray, folder))
    elif size is None:
        evaluate(args)
    elif size != "1" and args.out is None:
        raise InputError("several processes need --out, a folder that they share")
    else:
        device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        with process_group(device, timeout_minutes=_DAYS * 24 * 60) as args.device:
            evaluate(args)


def check_arguments(args: argparse.Namespace) -> None:
    """What can be known from the options alone."""
    check_json(args)
    if args.out is not None:
        require_writable(as_path("--out", args.out) / RECORD)
    elif args.overwrite:
        raise InputError("--overwrite needs --out")
    if args.throughput is not None and not (math.isfinite(args.throughput) and args.throughput >= 0):
        raise InputError(f"--throughput must be a number of seconds, got {args.throughput}")
    if args.reconstructions is None:
        args.crop = args.crop or "center"
        if args.crop == "none":
            raise InputError("--crop none needs --reconstructions")
    else:
        args.crop = args.crop or "none"
        if args.throughput is not None:
            raise InputError("--throughput needs a decoder, got --reconstructions")


@contextmanager
def _folder(args: argparse.Namespace) -> Iterator[Path]:
    """Where the parts of the measurement lie."""
    if args.out is not None:
        yield Path(args.out)
    else:
        with tempfile.TemporaryDirectory(prefix="msdd-fast-eval-") as path:
            yield Path(path)


def evaluate(args: argparse.Namespace) -> None:
    """In every process."""
    names, inputs = on_rank0_and_broadcast(lambda: list_inputs(args))

    def prepare() -> tuple[Job, dict[str, Any], Source]:
        job = make_job(args)
        return job, job.for_images(names, inputs), job.source(dict(enumerate(inputs)))

    job, protocol, source = on_all_ranks(prepare)
    with _folder(args) as path:
        folder = PartFolder(path, len(names), args.batch_size, protocol)

        def start() -> list[int]:
            folder.prepare(args.overwrite)
            missing = folder.missing()
            if len(missing) < len(folder.parts):
                say(args, f"{len(folder.parts) - len(missing)} of {len(folder.parts)} parts are already there")
            return missing

        def measure() -> None:
            mine = missing[rank() :: world_size()]
            total = sum(len(folder.parts[n]) for n in mine)
            with bar(args, total) if rank() == 0 else nullcontext() as shown:
                for n in mine:
                    part = measure_part(source, job.suite, folder.parts[n], args.batch_size, rank(), shown)
                    write_part(folder.path(n), part)

        def conclude() -> None:
            result, run_by = collect(folder, job.suite), {"processes": world_size(), **machine(job.suite.device)}
            report(args, job, protocol, names, result, run_by, job.throughput(inputs, result))

        missing = on_rank0_and_broadcast(start)
        on_all_ranks(measure)
        on_rank0_and_broadcast(conclude)


def _row(name: str, value: object) -> str:
    """Of a table for a terminal of 80 columns; a path is not broken."""
    indent = " " * 17
    wrapped = textwrap.wrap(str(value), 80 - len(indent), break_long_words=False, break_on_hyphens=False)
    return f"{name:16} " + f"\n{indent}".join(wrapped)


def report(
    args: argparse.Namespace,
    job: Job,
    protocol: dict[str, Any],
    names: list[str],
    result: Result,
    run_by: dict[str, Any],
    speed: dict[str, Any] | None = None,
) -> None:
    """Print and write it."""
    content: dict[str, Any] = {
        "set": args.set or str(args.folder),
        "split": args.split,
        "folder": str(args.folder),
        "count": len(result.images),
        "unreadable": len(result.unreadable),
        **job.about,
        **{k: v for k, v in protocol.items() if k not in ("images", "results", "figures", "weights")},
        **run_by,
        "mean": result.mean,
    }
    shown = {k: v for k, v in content.items() if k != "mean" and v is not None}
    say(args, *(_row(name, value) for name, value in shown.items()))
    say(args, *(f"{name:16} {value:.4f}" for name, value in result.mean.items()))
    content |= {"weights": job.suite.weights, "details": result.details}
    if speed:
        content["throughput"] = speed
        for way, figures in speed.items():
            numbers = {name: value for name, value in figures.items() if isinstance(value, float)}
            say(args, *(f"{way}: {name} {value:.2f}" for name, value in numbers.items()))
    images = {names[i]: figures for i, figures in sorted(result.images.items())}
    finish(args, {"msdd_fast": __version__, **content, "images": images})
    report_unreadable([reason for _, reason in sorted(result.unreadable.items())], len(names), args.strict)
