"""Measure reconstructions: PSNR and SSIM, and, given weights, LPIPS, a VGG-19 distance, FID and KID.

Images of a folder are encoded and decoded, or compared with those of a second folder (--reconstructions). The report
says everything that the figures depend on. Nothing is downloaded: a figure is measured when you name the weights of its
network. FID and KID are only those of InceptionV3 (--features inception=FILE); on another network they bear its name.

With --out, results lie in a folder as they come, and a run that was interrupted goes on there. Under torchrun, which
needs --out, or with --ray, several processes share the images; the figures are those of one. Images that cannot be read
are passed over and counted; the others keep their seeds. `msdd-fast table` makes tables of reports.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from msdd_fast import __version__
from msdd_fast.commands.arguments import add_batch_size, add_checkpoint, add_sampling, add_strict
from msdd_fast.commands.bulk.eval import evaluate_on_ray
from msdd_fast.commands.bulk.options import LOCAL, add_ray, ray_options
from msdd_fast.commands.evaluation.job import Job, list_inputs, machine, make_job
from msdd_fast.commands.evaluation.run import RECORD, PartFolder, Result, collect, measure_part, write_part
from msdd_fast.commands.evaluation.sources import CROPS, Source
from msdd_fast.commands.evaluation.suite import PIXELS
from msdd_fast.commands.inputs import report_unreadable
from msdd_fast.commands.output import add_json, bar, check_json, finish, say
from msdd_fast.errors import InputError
from msdd_fast.io.arguments import DTYPES, positive_int
from msdd_fast.io.files import as_path, require_writable
from msdd_fast.io.images import RESIZE_FILTERS
from msdd_fast.metrics.image import SSIM_DATA_RANGES
from msdd_fast.training.loop.distributed import (
    on_all_ranks,
    on_rank0_and_broadcast,
    process_group,
    rank,
    world_size,
)

_DAYS = 7  # how long a process waits for the slowest one


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="folder of images (searched recursively), or one image")
    parser.add_argument(
        "--reconstructions", metavar="DIR", help="compare with the images of the same names in DIR; nothing is decoded"
    )
    protocol = parser.add_argument_group("protocol")
    protocol.add_argument("--set", metavar="NAME", help="name of the set, for the report (default: the folder)")
    protocol.add_argument("--split", metavar="NAME", help="its split, for the report: val, test, ...")
    protocol.add_argument(
        "--crop",
        choices=CROPS,
        help="center: the largest square; adm: the authors' (default: center; with --reconstructions none)",
    )
    protocol.add_argument(
        "--resize",
        choices=("auto", *RESIZE_FILTERS),
        default="auto",
        help="filter of the crop (default: auto, for center BOX at whole factors and else bicubic, for adm bicubic)",
    )
    protocol.add_argument("--count", type=positive_int, metavar="N", help="the first N images only")
    protocol.add_argument(
        "--pixels",
        choices=PIXELS,
        default="float",
        help="measure results as they are, or rounded as a PNG is (default: %(default)s; features are of rounded ones)",
    )
    protocol.add_argument(
        "--decoder",
        choices=("eager", "engine"),
        default="eager",
        help="the model in plain PyTorch, or the engine (default: %(default)s)",
    )
    protocol.add_argument(
        "--dtype",
        choices=sorted(DTYPES),
        default="float32",
        help="arithmetic: autocast of encoder and decoder, or the engine's (default: %(default)s)",
    )
    figures = parser.add_argument_group("figures")
    figures.add_argument(
        "--ssim",
        nargs="+",
        choices=tuple(SSIM_DATA_RANGES),
        default=["ssim"],
        help="ssim_authors has the data range of the authors' script, which inflates it (default: ssim)",
    )
    figures.add_argument("--vgg19", metavar="FILE", help="vgg_normalised_conv3_1.pth, for the VGG-19 feature distance")
    figures.add_argument("--lpips-vgg", metavar="FILE", help="torchvision's vgg16-397923af.pth, for LPIPS")
    figures.add_argument("--lpips-alex", metavar="FILE", help="torchvision's alexnet-owt-7be5be79.pth, for LPIPS")
    figures.add_argument(
        "--features",
        action="append",
        default=[],
        metavar="NETWORK=FILE",
        help="for Frechet and kernel distance: inception (FID, KID), vgg19 or squeezenet; may be repeated",
    )
    figures.add_argument(
        "--throughput", type=float, metavar="SECONDS", help="also img/s, timed for SECONDS, and in the authors' way"
    )
    output = parser.add_argument_group("output")
    add_json(output, "the report, with every image's figures,")
    output.add_argument("--name", help="of the row in tables (default: the checkpoint, or DIR)")
    output.add_argument("-o", "--out", metavar="DIR", help="folder for results as they come; an old run goes on there")
    output.add_argument("--overwrite", action="store_true", help="measure again what is in --out")
    add_strict(output)
    add_checkpoint(parser)
    add_sampling(parser)
    add_batch_size(parser)
    add_ray(parser)


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
    say(args, *(f"{name:16} {value}" for name, value in shown.items()))
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
