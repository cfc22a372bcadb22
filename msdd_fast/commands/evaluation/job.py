"""What an evaluation measures: pairs of a source, by a suite of figures, under a protocol."""

from __future__ import annotations

import argparse
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msdd_fast.backends.environment import collect_env
from msdd_fast.commands.bulk.sources import Ref
from msdd_fast.commands.common import DTYPES, device_of, load_engine, load_tokenizer, pick_device
from msdd_fast.commands.evaluation import throughput
from msdd_fast.commands.evaluation.run import Result
from msdd_fast.commands.evaluation.sources import Compared, Reconstructed, Source, describe_crop, make_crop, pair_up
from msdd_fast.commands.evaluation.suite import Suite, parse_features
from msdd_fast.commands.inputs import encode
from msdd_fast.commands.record import digest
from msdd_fast.diffusion.checks import check_guidance, check_sampling
from msdd_fast.diffusion.noise import resolve_seeds
from msdd_fast.engine.compute import compute_dtype
from msdd_fast.errors import InputError
from msdd_fast.families import family_of
from msdd_fast.io.images import find_image_files

Inputs = tuple[Ref, ...]
"""What one pair is made of: an image; or a reconstruction and its original."""


class Job(ABC):
    """An evaluation by the command line ``args``; every process makes one.

    Attributes:
        suite: the figures.
        protocol: everything that the figures depend on but the images.
        about: what else the report says.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.suite = Suite(
            args.ssim, args.vgg19, args.lpips_vgg, args.lpips_alex, parse_features(args.features), args.pixels
        )
        self.about: dict[str, Any] = {}
        self.protocol: dict[str, Any] = {
            "batch_size": args.batch_size,
            "crop_name": args.crop,
            "resize": args.resize,
            "pixels": args.pixels,
            "figures": list(self.suite.pairs),
            "weights": self.suite.weights,
        }

    def for_images(self, names: Sequence[str], inputs: Sequence[Inputs]) -> dict[str, Any]:
        """The whole protocol. Raises InputError if these images cannot be measured."""
        if self.suite.networks and len(names) < 2:
            raise InputError(f"--features needs at least 2 images, got {len(names)}")
        return {"images": digest(json.dumps(list(names))), **self.protocol}

    @abstractmethod
    def source(self, inputs: Mapping[int, Inputs]) -> Source:
        """The pairs of these images, by their number in the whole set."""

    def throughput(self, inputs: Sequence[Inputs], result: Result) -> dict[str, Any] | None:
        """For the report, None if it was not asked for. Measured by one process while the others wait."""
        return None


class Comparison(Job):
    """Of two folders."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self.suite.to(pick_device(args.device))
        self.protocol |= {"mode": "compare", "crop": describe_crop(args.crop, args.resize)}
        self.about = {
            "reconstructions": args.reconstructions,
            "name": args.name or Path(args.reconstructions).name or args.reconstructions,
        }

    def for_images(self, names: Sequence[str], inputs: Sequence[Inputs]) -> dict[str, Any]:
        results = digest(json.dumps([str(result) for result, _ in inputs]))
        return {**super().for_images(names, inputs), "results": results}

    def source(self, inputs: Mapping[int, Inputs]) -> Compared:
        pairs = {i: (result, reference) for i, (result, reference) in inputs.items()}
        return Compared(pairs, self.args.crop, self.args.resize)


class Reconstruction(Job):
    """By a tokenizer."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self.tokenizer = load_tokenizer(args)
        self.device, cfg = device_of(self.tokenizer), self.tokenizer.config
        steps = cfg.sampling.steps if args.steps is None else args.steps
        self.steps, self.cfg_scale = check_sampling(
            steps, cfg.sampling.cfg_scale if args.cfg_scale is None else args.cfg_scale
        )
        check_guidance(cfg, self.cfg_scale)
        self.suite.to(self.device)
        self.dtype = DTYPES[args.dtype]
        if args.decoder == "engine":
            self.dtype, _ = compute_dtype(self.dtype, self.device)
        self.protocol |= {
            "mode": "reconstruct",
            "model": digest(cfg.to_json(), self.tokenizer.state_dict()),
            "crop": f"{describe_crop(args.crop, args.resize)}, to {cfg.image_size} px",
            "image_size": cfg.image_size,
            "steps_per_scale": self.steps,
            "cfg_scale": self.cfg_scale,
            "seed": args.seed,
            "decoder": args.decoder,
            "dtype": args.dtype,
            "computed_in": str(self.dtype).removeprefix("torch."),
        }
        self.about = {
            "checkpoint": args.checkpoint,
            "name": args.name or Path(args.checkpoint).name or args.checkpoint,
            "latent_shape": list(family_of(cfg).example),
            "scales": cfg.schedule.num_stages,
        }

    def for_images(self, names: Sequence[str], inputs: Sequence[Inputs]) -> dict[str, Any]:
        resolve_seeds(self.args.seed, len(names))
        return super().for_images(names, inputs)

    def source(self, inputs: Mapping[int, Inputs]) -> Reconstructed:
        size = self.tokenizer.config.image_size
        crop = make_crop(self.args.crop, self.args.resize, size)
        images = {i: image for i, (image,) in inputs.items()}
        return Reconstructed(images, crop, size, self.device, self.args.seed, self.encode, self.decode, self.context)

    def encode(self, images: Tensor, names: Sequence[object]) -> Tensor:
        return encode(self.tokenizer, images, names)

    @cached_property
    def decode(self) -> Callable[[Tensor, list[int]], Tensor]:
        """Latents and seeds to images."""
        if self.args.decoder == "engine":
            return load_engine(self.args, self.tokenizer, self.args.batch_size).decode
        return lambda z, seeds: self.tokenizer.decode(z, seeds, self.steps, self.cfg_scale)

    def context(self) -> AbstractContextManager[object]:
        """What encoder and decoder run in."""
        if self.args.decoder == "engine" or self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def throughput(self, inputs: Sequence[Inputs], result: Result) -> dict[str, Any] | None:
        args = self.args
        if args.throughput is None:
            return None
        first = range(min(args.batch_size, len(inputs)))
        _, images = self.source({i: inputs[i] for i in first}).images(first)
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


def make_job(args: argparse.Namespace) -> Job:
    """Raises InputError for options that do not fit each other, the model or this machine."""
    return Reconstruction(args) if args.reconstructions is None else Comparison(args)


def list_inputs(args: argparse.Namespace) -> tuple[list[str], list[Inputs]]:
    """Names of the images for the report, and what each pair is made of. Raises InputError if there are none."""
    files = find_image_files(args.folder)[: args.count]
    names = [str(f) for f in files]
    if args.reconstructions is None:
        return names, [(Ref(name),) for name in names]
    roots = Path(args.folder), Path(args.reconstructions)
    results = pair_up(files, find_image_files(args.reconstructions), roots)
    return names, [(Ref(str(result)), Ref(name)) for result, name in zip(results, names, strict=True)]


def machine(device: torch.device) -> dict[str, Any]:
    """What figures are computed on, for the report."""
    model = torch.cuda.get_device_name(device) if device.type == "cuda" else collect_env()["cpu"]["model"]
    return {"device": model, "threads": torch.get_num_threads(), "torch": torch.__version__}
