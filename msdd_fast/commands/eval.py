"""Measure reconstructions of a folder: PSNR, SSIM and, given its weights, a VGG-19 feature distance.

The report says which pictures, crop and filters the numbers belong to.
"""

from __future__ import annotations

import argparse
import json

from tqdm import tqdm

from msdd_fast.commands.common import (
    add_batch_size,
    add_checkpoint,
    add_sampling,
    chunks,
    device_of,
    load_batch,
    load_tokenizer,
)
from msdd_fast.io.files import atomic_write, require_writable
from msdd_fast.io.images import CROP_DESCRIPTION, find_image_files
from msdd_fast.metrics.image import figures
from msdd_fast.metrics.vgg19 import Vgg19Distance


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="folder of pictures (searched recursively)")
    parser.add_argument("--vgg19", metavar="FILE", help="vgg_normalised_conv3_1.pth, for the VGG-19 feature distance")
    parser.add_argument("--json", metavar="FILE", help="also write the report, with every image's figures")
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
    with tqdm(total=len(files), unit="img", disable=None) as bar:
        for part in chunks(len(files), args.batch_size):
            x = load_batch([files[i] for i in part], cfg.image_size).to(device)
            y = tokenizer.decode(tokenizer.encode(x), args.seed + part.start, args.steps, args.cfg_scale)
            for name, measured in figures(y, x, distance).items():
                values.setdefault(name, []).extend(measured.tolist())
            bar.update(len(part))
    report = {
        "set": str(args.folder),
        "count": len(files),
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
        per_image = {str(f): {n: v[i] for n, v in values.items()} for i, f in enumerate(files)}
        with atomic_write(args.json) as temporary:
            temporary.write_text(json.dumps({**report, "images": per_image}, indent=2) + "\n")
