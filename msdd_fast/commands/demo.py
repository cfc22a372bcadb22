"""Reconstruct scikit-image's bundled photographs, write a picture and print img/s for each scale."""

from __future__ import annotations

import argparse

import torch

from msdd_fast.bench.decode.scales import format_table, measure_engine_scales, measure_scales
from msdd_fast.commands.common import (
    add_batch_size,
    add_checkpoint,
    add_dtype,
    add_sampling,
    device_of,
    load_engine,
    load_tokenizer,
)
from msdd_fast.commands.inputs import require_finite
from msdd_fast.commands.reconstruction import draw, reconstruct
from msdd_fast.io.images import require_picture_path, save_image
from msdd_fast.io.photographs import PHOTOS, photographs
from msdd_fast.metrics.image import psnr


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--out", default="out/demo.png", help="picture to write (default: %(default)s)")
    add_checkpoint(parser)
    add_sampling(parser)
    add_dtype(parser)
    add_batch_size(parser, default=1)


def run(args: argparse.Namespace) -> None:
    require_picture_path(args.out)
    tokenizer = load_tokenizer(args)
    cfg, device = tokenizer.config, device_of(tokenizer)
    images = photographs(cfg.image_size).to(device)
    engine = load_engine(args, tokenizer, args.batch_size)
    r = reconstruct(tokenizer, images, args.seed, engine)
    require_finite("decoding", r.result, PHOTOS)
    save_image(draw(r, size=256), args.out)
    for name, value in zip(PHOTOS, psnr(r.result, r.original).tolist(), strict=True):
        print(f"{name:>12}: {value:.2f} dB")
    print(f"wrote {args.out}: original, clean estimate of each coarser scale, result\n")
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    steps = args.steps or cfg.sampling.steps
    run_at = f"{cfg.image_size} px, batch {args.batch_size}, {steps} step(s) per scale"
    dtypes = [str(d).removeprefix("torch.") for d in (next(tokenizer.parameters()).dtype, engine.dtype)]
    print(f"{args.checkpoint}, {run_at}, {where}")
    print(f"\nplain PyTorch, {dtypes[0]}")
    print(format_table(measure_scales(tokenizer, args.batch_size, args.steps, args.cfg_scale)))
    print(f"\nengine, {dtypes[1]}")
    print(format_table(measure_engine_scales(engine, args.batch_size)))
