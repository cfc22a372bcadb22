"""Encode photographs and decode them again; write a picture: original, clean estimate of every stage, result."""

from __future__ import annotations

import argparse

from msdd_fast.commands.common import (
    add_checkpoint,
    add_dtype,
    add_sampling,
    device_of,
    load_batch,
    load_engine,
    load_tokenizer,
)
from msdd_fast.commands.reconstruction import draw, reconstruct
from msdd_fast.io.images import find_image_files, require_picture_path, save_image
from msdd_fast.metrics.image import psnr


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("photos", nargs="+", metavar="PHOTO", help="any pictures; the largest centred square is used")
    parser.add_argument("-o", "--output", default="reconstruction.png", help="picture to write (default: %(default)s)")
    add_checkpoint(parser)
    add_sampling(parser)
    add_dtype(parser)


def run(args: argparse.Namespace) -> None:
    require_picture_path(args.output)
    files = [f for photo in args.photos for f in find_image_files(photo)]
    tokenizer = load_tokenizer(args)
    images = load_batch(files, tokenizer.config.image_size).to(device_of(tokenizer))
    r = reconstruct(tokenizer, images, args.seed, load_engine(args, tokenizer, len(images)))
    save_image(draw(r), args.output)
    for file, value in zip(files, psnr(r.result, r.original).tolist(), strict=True):
        print(f"{file}: {value:.2f} dB")
    print(f"wrote {args.output}: original, clean estimate of each coarser scale, result")
