"""``msdd-fast decode --ray``: the pictures of ``decode``, by many workers, as files or as WebDataset shards."""

from __future__ import annotations

import argparse
from pathlib import Path

from msdd_fast.commands.arguments import SHARD_SIZE
from msdd_fast.commands.bulk.options import LOCAL, RayOptions, absolute_checkpoint
from msdd_fast.commands.bulk.run import MANIFEST, run_units, split_units
from msdd_fast.commands.bulk.sources import list_latents
from msdd_fast.commands.bulk.workers import DecodeWorker, Unit
from msdd_fast.commands.common import DTYPES, pick_device
from msdd_fast.commands.output import finish, say
from msdd_fast.commands.record import claim, decode_options, kept_with_results
from msdd_fast.commands.shards import RECORD
from msdd_fast.diffusion.checks import check_guidance, check_latents, check_sampling
from msdd_fast.diffusion.noise import resolve_seeds
from msdd_fast.engine.compute import compute_dtype
from msdd_fast.errors import InputError
from msdd_fast.families import family_of
from msdd_fast.families.base import require_unconditioned
from msdd_fast.io.files import require_writable
from msdd_fast.io.images import IMAGE_SUFFIXES
from msdd_fast.tokenizer import Tokenizer

BATCHES = 16
"""In a unit of pictures: whole batches, so that they are those of ``decode``, whose rounding depends on them."""


def decode_on_ray(args: argparse.Namespace, options: RayOptions, record: str) -> None:
    """``record`` is the name of the file of options in the output folder."""
    output = Path(args.out).absolute()  # workers have other working directories
    if output.suffix.lower() in IMAGE_SUFFIXES or (output.exists() and not output.is_dir()):
        raise InputError(f"--out must be a folder with --ray, got {output}")
    if args.shard_size is not None and not args.shards:
        raise InputError("--shard-size needs --shards")
    source = list_latents(Path(args.source).absolute(), (Path(args.source) / RECORD).exists())
    count = len(source.names)
    if not count:
        raise InputError(f"{args.source} holds no latents")
    require_writable(output / record)
    tokenizer = Tokenizer.from_pretrained(args.checkpoint)
    config = tokenizer.config
    require_unconditioned(family_of(config), "--ray")
    check_latents(source.part(0, 1)[0].load()[:1], *config.latent_shape)
    steps, cfg_scale = check_sampling(
        config.sampling.steps if args.steps is None else args.steps,
        config.sampling.cfg_scale if args.cfg_scale is None else args.cfg_scale,
    )
    check_guidance(config, cfg_scale)
    resolve_seeds([args.seed, args.seed + count - 1], 2)
    here = options.address == LOCAL
    computed_in = compute_dtype(DTYPES[args.dtype], pick_device(args.device))[0] if here else "what the workers have"
    mine = decode_options(source.digest(), tokenizer, args.seed, steps, cfg_scale, args.dtype, computed_in)
    size = (args.shard_size or SHARD_SIZE) if args.shards else BATCHES * args.batch_size
    parts = split_units(count, size)
    if args.shards:
        mine |= {"format": "tar", "shard_size": size, "batch_size": args.batch_size}
        outputs = [output / f"{i:06d}.tar" for i in range(len(parts))]
        targets = outputs
    else:
        outputs = [output] * len(parts)
        targets = [output / f"{name}.png" for name in source.names]
    units = [
        Unit(first, n, str(file), source.names[first : first + n], [list(p) for p in source.part(first, first + n)])
        for (first, n), file in zip(parts, outputs, strict=True)
    ]
    arguments = {
        "checkpoint": absolute_checkpoint(args.checkpoint),
        "batch": args.batch_size,
        "seed": args.seed,
        "steps": steps,
        "cfg_scale": cfg_scale,
        "dtype": DTYPES[args.dtype],
    }
    with kept_with_results(output / record, targets):
        claim(mine, output / record, targets, args.overwrite)
        if args.overwrite:
            (output / MANIFEST).unlink(missing_ok=True)
        wrote = sum(line["count"] for line, new in run_units(DecodeWorker, arguments, units, output, options) if new)
    if wrote < count:
        say(args, f"{count - wrote} of {count} are already there")
    say(args, f"wrote {wrote} pictures to {args.out}")
    finish(args, {"out": args.out, "images": [str(t) for t in targets], "written": wrote, "options": mine})
