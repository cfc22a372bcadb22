"""Measure reconstructions: PSNR and SSIM, and, given weights, LPIPS, a VGG-19 distance, FID and KID.

Images of a folder are encoded and decoded, or compared with those of a second folder (--reconstructions). The report
says everything that the figures depend on. Nothing is downloaded: a figure is measured when you name the weights of its
network. FID and KID are only those of InceptionV3 (--features inception=FILE); on another network they bear its name.

With --out, results lie in a folder as they come, and a run that was interrupted goes on there. Under torchrun, which
needs --out, several processes share the images; the figures are those of one. Images that cannot be read are passed
over and counted; the others keep their seeds. `msdd-fast table` makes tables of reports.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msdd_fast import __version__
from msdd_fast.backends.environment import collect_env
from msdd_fast.commands.common import (
    DTYPES,
    add_batch_size,
    add_checkpoint,
    add_sampling,
    device_of,
    load_engine,
    load_tokenizer,
    pick_device,
    positive_int,
)
from msdd_fast.commands.evaluation import throughput
from msdd_fast.commands.evaluation.run import PartFolder, Result, collect, measure_parts
from msdd_fast.commands.evaluation.sources import CROPS, Compared, Reconstructed, Source, describe_crop, make_crop
from msdd_fast.commands.evaluation.suite import PIXELS, Suite, parse_features
from msdd_fast.commands.inputs import add_strict, encode, report_unreadable
from msdd_fast.commands.record import digest
from msdd_fast.diffusion.checks import check_guidance, check_sampling
from msdd_fast.diffusion.noise import resolve_seeds
from msdd_fast.errors import InputError
from msdd_fast.families import family_of
from msdd_fast.io.files import as_path, is_standard_output, require_writable
from msdd_fast.io.images import RESIZE_FILTERS, find_image_files
from msdd_fast.io.json_files import write_json
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
    output.add_argument("--json", metavar="FILE", help="also write the report, with every image's figures")
    output.add_argument("--name", help="of the row in tables (default: the checkpoint, or DIR)")
    output.add_argument("-o", "--out", metavar="DIR", help="folder for results as they come; an old run goes on there")
    output.add_argument("--overwrite", action="store_true", help="measure again what is in --out")
    add_strict(output)
    add_checkpoint(parser)
    add_sampling(parser)
    add_batch_size(parser)


def run(args: argparse.Namespace) -> None:
    check_arguments(args)
    size = os.environ.get("WORLD_SIZE")
    if size is None:
        evaluate(args)
        return
    if size != "1" and args.out is None:
        raise InputError("several processes need --out, a folder that they share")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with process_group(device, timeout_minutes=_DAYS * 24 * 60) as args.device:
        evaluate(args)


def check_arguments(args: argparse.Namespace) -> None:
    """What can be known from the options alone."""
    if args.json:
        require_writable(args.json)
    if args.out is not None:
        require_writable(as_path("--out", args.out) / "eval.json")
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


def evaluate(args: argparse.Namespace) -> None:
    """In every process."""
    files = on_rank0_and_broadcast(lambda: find_image_files(args.folder)[: args.count])
    job = on_all_ranks(lambda: (_Comparison if args.reconstructions else _Reconstruction)(args, files))
    with ExitStack() as stack:
        path = Path(args.out or stack.enter_context(tempfile.TemporaryDirectory(prefix="msdd-fast-eval-")))
        folder = PartFolder(path, len(files), args.batch_size, job.protocol)

        def start() -> list[int]:
            folder.prepare(args.overwrite)
            missing = folder.missing()
            if len(missing) < len(folder.parts):
                there = len(folder.parts) - len(missing)
                print(f"{there} of {len(folder.parts)} parts are already there", file=sys.stderr)
            return missing

        missing = on_rank0_and_broadcast(start)
        on_all_ranks(lambda: measure_parts(job.source, job.suite, folder, missing[rank() :: world_size()], rank()))
        on_rank0_and_broadcast(lambda: finish(args, job, collect(folder, job.suite)))


class _Job:
    """What is to be measured.

    Attributes:
        source: of the pairs.
        suite: the figures.
        protocol: everything that the figures depend on.
        about: what else the report says.
    """

    source: Source

    def __init__(self, args: argparse.Namespace, files: Sequence[Path]) -> None:
        self.suite = Suite(
            args.ssim, args.vgg19, args.lpips_vgg, args.lpips_alex, parse_features(args.features), args.pixels
        )
        if self.suite.networks and len(files) < 2:
            raise InputError(f"--features needs at least 2 images, got {len(files)}")
        self.about: dict[str, Any] = {}
        self.protocol: dict[str, Any] = {
            "images": digest(json.dumps([str(f) for f in files])),
            "batch_size": args.batch_size,
            "crop_name": args.crop,
            "resize": args.resize,
            "pixels": args.pixels,
            "figures": list(self.suite.pairs),
            "weights": self.suite.weights,
        }

    def throughput(self, args: argparse.Namespace, result: Result) -> dict[str, Any] | None:
        return None


class _Comparison(_Job):
    """Of two folders."""

    def __init__(self, args: argparse.Namespace, files: Sequence[Path]) -> None:
        super().__init__(args, files)
        self.suite.to(pick_device(args.device))
        results = find_image_files(args.reconstructions)
        roots = Path(args.folder), Path(args.reconstructions)
        source = Compared(files, results, roots, args.crop, args.resize)
        self.source = source
        self.protocol |= {
            "mode": "compare",
            "results": digest(json.dumps([str(f) for f in source.results])),
            "crop": describe_crop(args.crop, args.resize),
        }
        self.about = {
            "reconstructions": args.reconstructions,
            "name": args.name or Path(args.reconstructions).name or args.reconstructions,
        }


class _Reconstruction(_Job):
    """By a tokenizer."""

    def __init__(self, args: argparse.Namespace, files: Sequence[Path]) -> None:
        super().__init__(args, files)
        self.tokenizer = tokenizer = load_tokenizer(args)
        self.device, cfg = device_of(tokenizer), tokenizer.config
        steps = cfg.sampling.steps if args.steps is None else args.steps
        steps, cfg_scale = check_sampling(steps, cfg.sampling.cfg_scale if args.cfg_scale is None else args.cfg_scale)
        check_guidance(cfg, cfg_scale)
        resolve_seeds(args.seed, len(files))
        self.suite.to(self.device)
        self.context: Callable[[], AbstractContextManager[object]] = nullcontext
        dtype = DTYPES[args.dtype]
        if args.decoder == "engine":
            engine = load_engine(args, tokenizer, args.batch_size)
            self.decode: Callable[[Tensor, list[int]], Tensor] = engine.decode
            dtype = engine.dtype
        else:
            self.decode = lambda z, seeds: tokenizer.decode(z, seeds, steps, cfg_scale)
            if dtype != torch.float32:
                self.context = lambda: torch.autocast(self.device.type, dtype)
        crop = make_crop(args.crop, args.resize, cfg.image_size)
        self.reconstructed = Reconstructed(
            files, crop, cfg.image_size, self.device, args.seed, self.encode, self.decode, self.context
        )
        self.source = self.reconstructed
        self.protocol |= {
            "mode": "reconstruct",
            "model": digest(cfg.to_json(), tokenizer.state_dict()),
            "crop": f"{describe_crop(args.crop, args.resize)}, to {cfg.image_size} px",
            "image_size": cfg.image_size,
            "steps_per_scale": steps,
            "cfg_scale": cfg_scale,
            "seed": args.seed,
            "decoder": args.decoder,
            "dtype": args.dtype,
            "computed_in": str(dtype).removeprefix("torch."),
        }
        self.about = {
            "checkpoint": args.checkpoint,
            "name": args.name or Path(args.checkpoint).name or args.checkpoint,
            "latent_shape": list(family_of(cfg).example),
            "scales": cfg.schedule.num_stages,
        }

    def encode(self, images: Tensor, names: Sequence[object]) -> Tensor:
        return encode(self.tokenizer, images, names)

    def throughput(self, args: argparse.Namespace, result: Result) -> dict[str, Any] | None:
        """Measured by one process while the others wait."""
        if args.throughput is None:
            return None
        _, images = self.reconstructed.images(range(min(args.batch_size, len(self.source.names))))
        if not len(images):
            raise InputError("--throughput needs an image that can be read in the first batch")
        x, seeds = images.to(self.device), [args.seed + i for i in range(len(images))]
        with self.context():
            z = self.encode(x, seeds)
            ours = {
                "decode_images_per_second": throughput.warm(lambda: self.decode(z, seeds), len(x), args.throughput),
                "encode_decode_images_per_second": throughput.warm(
                    lambda: self.decode(self.encode(x, seeds), seeds), len(x), args.throughput
                ),
            }
        authors = result.timed / result.seconds if result.seconds else None
        return throughput.describe(ours, authors, args.batch_size)


def finish(args: argparse.Namespace, job: _Job, result: Result) -> None:
    """Print and write the report."""
    names = job.source.names
    report: dict[str, Any] = {
        "set": args.set or str(args.folder),
        "split": args.split,
        "folder": str(args.folder),
        "count": len(result.images),
        "unreadable": len(result.unreadable),
        **job.about,
        **{k: v for k, v in job.protocol.items() if k not in ("images", "results", "figures", "weights")},
        "processes": world_size(),
        **machine(job.suite.device),
        "mean": result.mean,
    }
    shown = sys.stderr if args.json and is_standard_output(args.json) else sys.stdout
    for name, value in report.items():
        if name != "mean" and value is not None:
            print(f"{name:16} {value}", file=shown)
    for name, value in result.mean.items():
        print(f"{name:16} {value:.4f}", file=shown)
    report |= {"weights": job.suite.weights, "details": result.details}
    if speed := job.throughput(args, result):
        report["throughput"] = speed
        for way, figures in speed.items():
            for name, value in figures.items():
                if isinstance(value, float):
                    print(f"{way}: {name} {value:.2f}", file=shown)
    if args.json:
        images = {names[i]: figures for i, figures in sorted(result.images.items())}
        write_json(args.json, {"msdd_fast": __version__, **report, "images": images})
    report_unreadable([reason for _, reason in sorted(result.unreadable.items())], len(names), args.strict)


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were computed on."""
    model = torch.cuda.get_device_name(device) if device.type == "cuda" else collect_env()["cpu"]["model"]
    return {"device": model, "threads": torch.get_num_threads(), "torch": torch.__version__}
