"""Encode photographs and decode them again; write a picture: original, clean estimate of every stage, result.

Images that cannot be read are passed over and counted; the others keep their seeds.
"""

from __future__ import annotations

import argparse

from msdd_fast.commands.arguments import add_checkpoint, add_dtype, add_sampling, add_strict
from msdd_fast.commands.output import add_json, check_json, finish, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("photos", nargs="+", metavar="PHOTO", help="any pictures; the largest centred square is used")
    parser.add_argument("-o", "--out", default="reconstruction.png", help="picture to write (default: %(default)s)")
    add_strict(parser)
    add_checkpoint(parser)
    add_sampling(parser)
    add_dtype(parser)
    add_json(parser, "the PSNR of every image")


def run(args: argparse.Namespace) -> None:
    from msdd_fast.commands.common import device_of, load_engine, load_tokenizer
    from msdd_fast.commands.inputs import ImageReader, printable, require_finite
    from msdd_fast.commands.reconstruction import draw, reconstruct
    from msdd_fast.io.images import find_image_files, require_picture_path, save_image
    from msdd_fast.metrics.image import psnr

    check_json(args)
    require_picture_path(args.out)
    files = [f for photo in args.photos for f in find_image_files(photo)]
    tokenizer = load_tokenizer(args)
    reader = ImageReader(tokenizer.config.image_size)
    read, images = reader.read(files)
    reader.require_any()
    shown, seeds = [files[i] for i in read], [args.seed + i for i in read]
    images = images.to(device_of(tokenizer))
    r = reconstruct(tokenizer, images, seeds, load_engine(args, tokenizer, len(images)))
    require_finite("decoding", r.result, shown)
    save_image(draw(r), args.out)
    values = psnr(r.result, r.original).tolist()
    for file, value in zip(shown, values, strict=True):
        say(args, f"{printable(file)}: {value:.2f} dB")
    say(args, f"wrote {args.out}: original, clean estimate of each coarser scale, result")
    results = [{"file": str(file), "psnr_db": value} for file, value in zip(shown, values, strict=True)]
    finish(args, {"out": args.out, "checkpoint": args.checkpoint, "images": results})
    reader.report(args.strict)
