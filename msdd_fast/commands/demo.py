"""Reconstruct scikit-image's bundled photographs, write a picture and print img/s for each scale."""

from __future__ import annotations

import argparse

from msdd_fast.commands.arguments import add_batch_size, add_checkpoint, add_dtype, add_sampling
from msdd_fast.commands.output import add_json, check_json, finish, say, steps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--out", default="out/demo.png", help="picture to write (default: %(default)s)")
    add_checkpoint(parser)
    add_sampling(parser)
    add_dtype(parser)
    add_batch_size(parser, default=1)
    add_json(parser, "PSNR and speed")


def run(args: argparse.Namespace) -> None:
    import torch

    from msdd_fast.bench.decode.scales import format_table, measure_engine_scales, measure_scales
    from msdd_fast.commands.common import device_of, load_engine, load_tokenizer
    from msdd_fast.commands.inputs import require_finite
    from msdd_fast.commands.reconstruction import draw, reconstruct
    from msdd_fast.io.images import require_picture_path, save_image
    from msdd_fast.io.photographs import PHOTOS, photographs
    from msdd_fast.metrics.image import psnr

    check_json(args)
    require_picture_path(args.out)
    tokenizer = load_tokenizer(args)
    cfg, device = tokenizer.config, device_of(tokenizer)
    images = photographs(cfg.image_size).to(device)
    engine = load_engine(args, tokenizer, args.batch_size)
    r = reconstruct(tokenizer, images, args.seed, engine)
    require_finite("decoding", r.result, PHOTOS)
    save_image(draw(r, size=256), args.out)
    values = dict(zip(PHOTOS, psnr(r.result, r.original).tolist(), strict=True))
    say(args, *(f"{name:>12}: {value:.2f} dB" for name, value in values.items()))
    say(args, f"wrote {args.out}: original, clean estimate of each coarser scale, result\n")
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    run_at = f"{cfg.image_size} px, batch {args.batch_size}, {args.steps or cfg.sampling.steps} step(s) per scale"
    dtypes = [str(d).removeprefix("torch.") for d in (next(tokenizer.parameters()).dtype, engine.dtype)]
    say(args, f"{args.checkpoint}, {run_at}, {where}")
    with steps(args, 2) as step:
        step("timing plain PyTorch")
        plain = measure_scales(tokenizer, args.batch_size, args.steps, args.cfg_scale)
        step("timing the engine")
        fast = measure_engine_scales(engine, args.batch_size)
    say(args, f"\nplain PyTorch, {dtypes[0]}", format_table(plain))
    say(args, f"\nengine, {dtypes[1]}", format_table(fast))
    speeds = {
        name: {str(t.resolution or "whole"): t.images_per_second for t in timings}
        for name, timings in (("plain_pytorch", plain), ("engine", fast))
    }
    result = {"out": args.out, "checkpoint": args.checkpoint, "batch_size": args.batch_size, "device": where}
    finish(args, {**result, "psnr_db": values, "images_per_second": speeds})
