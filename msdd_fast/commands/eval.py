"""Measure reconstructions of a folder: PSNR, SSIM and, given its weights, a VGG-19 feature distance.

The report says which images, crop and filters the numbers belong to. Images that cannot be read are passed over and
counted; the others keep their seeds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tqdm import tqdm

from msdd_fast.commands.common import (
    add_batch_size,
    add_checkpoint,
    add_sampling,
    chunks,
    device_of,
    load_tokenizer,
)
from msdd_fast.commands.inputs import ImageReader, add_strict, encode, require_finite
from msdd_fast.io.files import require_writable
from msdd_fast.io.images import CROP_DESCRIPTION, find_image_files
from msdd_fast.io.json_files import write_json
from msdd_fast.metrics.image import figures
from msdd_fast.metrics.vgg19 import Vgg19Distance


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="folder of pictures (searched recursively)")
    parser.add_argument("--vgg19", metavar="FILE", help="vgg_normalised_conv3_1.pth, for the VGG-19 feature distance")
    parser.add_argument("--json", metavar="FILE", help="also write the report, with every image's figures")
    add_strict(parser)
    add_checkpoint(parser)
    add_sampling(parser)
    add_batch_size(parser)


def run(args: argparse.Namespace) -> None:
    if args.json:
        require_writable(args.json)
    files = find_image_files(args.folder)
    distance = Vgg19Distance(args.vgg19) if args.vgg19 else None
    tokenizer = load_tokenizer(args)
    device, cfg = device_of(tokenizer), tokenizer.config
    if distance is not None:
        distance.to(device)
    values: dict[str, list[float]] = {}
    measured_files: list[Path] = []
    reader = ImageReader(cfg.image_size)
    with tqdm(total=len(files), unit="img", disable=None) as bar:
        for part in chunks(len(files), args.batch_size):
            read, images = reader.read([files[i] for i in part])
            if read:
                index = [part.start + i for i in read]
                batch, x = [files[i] for i in index], images.to(device)
                seeds = [args.seed + i for i in index]
                y = tokenizer.decode(encode(tokenizer, x, batch), seeds, args.steps, args.cfg_scale)
                require_finite("decoding", y, batch)
                for name, measured in figures(y, x, distance).items():
                    values.setdefault(name, []).extend(measured.tolist())
                measured_files += batch
            bar.update(len(part))
    reader.require_any()
    report = {
        "set": str(args.folder),
        "count": len(measured_files),
        "unreadable": len(reader.unreadable),
        "crop": f"{CROP_DESCRIPTION}, to {cfg.image_size} px",
        "checkpoint": args.checkpoint,
        "steps_per_scale": args.steps or cfg.sampling.steps,
        "cfg_scale": cfg.sampling.cfg_scale if args.cfg_scale is None else args.cfg_scale,
        "seed": args.seed,
        "mean": {name: sum(v) / len(v) for name, v in values.items()},
    }
    for name, value in report.items():
        if name != "mean":
            print(f"{name:16} {value}")
    for name, value in report["mean"].items():
        print(f"{name:16} {value:.4f}")
    if args.json:
        per_image = {str(f): {n: v[i] for n, v in values.items()} for i, f in enumerate(measured_files)}
        write_json(args.json, {**report, "images": per_image})
    reader.report(args.strict)
