"""What `decode` does: latents to picture files, those that are there already left alone."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from msdd_fast.commands.bulk.decode import decode_on_ray
from msdd_fast.commands.bulk.options import ray_options
from msdd_fast.commands.common import chunks, load_engine, load_tokenizer
from msdd_fast.commands.output import bar, check_json, finish, say
from msdd_fast.commands.record import claim, decode_options, digest
from msdd_fast.commands.shards import RECORD
from msdd_fast.diffusion.checks import check_latents, first_not_finite
from msdd_fast.diffusion.noise import resolve_seeds
from msdd_fast.engine import FastDecoder
from msdd_fast.errors import InputError
from msdd_fast.families.base import Conditions
from msdd_fast.io.files import require_writable
from msdd_fast.io.images import IMAGE_SUFFIXES, save_image, to_image
from msdd_fast.io.latents import Latents, concatenate, load_latents
from msdd_fast.layers.request import Request

OPTIONS = "decode.json"


def conditions(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of ``decode`` among the command line's."""
    given = {"text": args.text_features, "null_text": args.null_text_features, "sigma": args.sigma}
    given |= {"height": args.height, "width": args.width}
    return {name: value for name, value in given.items() if value is not None}


def decode(args: argparse.Namespace) -> None:
    check_json(args)
    ray = ray_options(args)
    if ray is not None:
        if conditions(args):
            raise InputError("--text-features, --null-text-features, --sigma, --height and --width are not for --ray")
        if args.max_memory is not None:
            raise InputError("--max-memory is not for --ray")
        decode_on_ray(args, ray, OPTIONS)
        return
    if args.shard_size is not None:
        raise InputError("--shard-size needs --ray and --shards")
    latents = read(Path(args.source))
    targets = output_files(latents, Path(args.out))
    if targets:
        require_writable(targets[0])
    tokenizer = load_tokenizer(args)
    check_latents(latents.z, *tokenizer.config.latent_shape)
    check_finite(latents)
    seeds = resolve_seeds(args.seed, len(latents.z))
    engine, given = load_engine(args, tokenizer, args.batch_size, args.max_memory), conditions(args)
    found = engine.conditions(latents.z[:1], **given)  # for its errors, before anything is written
    z = digest(json.dumps(latents.names), {"z": latents.z})
    mine = decode_options(z, tokenizer, args.seed, engine.steps, engine.cfg_scale, args.dtype, engine.dtype)
    mine |= recorded(given, found)
    request = engine.request(latents.z[: args.batch_size], conditions=found)
    tile = tile_of(engine, request)
    if tile is not None:
        mine["tile"] = tile
    claim(mine, options_file(Path(args.out)), targets, args.overwrite)
    missing = [args.overwrite or not path.exists() for path in targets]
    if tile is not None:
        say(args, f"decoding in tiles of {tile} px, which changes the pictures: --max-memory allows no larger ones")
    if not all(missing):
        say(args, f"{len(targets) - sum(missing)} of {len(targets)} are already there")
    with bar(args, sum(missing)) as shown:
        for part in chunks(len(targets), args.batch_size):
            todo = [i for i in part if missing[i]]
            if todo:
                # All of the batch, as in a run from the start: rounding depends on the batch size.
                index = slice(part.start, part.stop)
                images = engine.decode(latents.z[index], seeds[index], tile=tile, **given)
                require_tile(tile, tile_of(engine, request.with_batch(len(part)), tile))
                if not images.isfinite().all():
                    raise InputError(f"decoding gave NaN or Inf for one of {', '.join(latents.names[index])}")
                for i in todo:
                    save_image(to_image(images[i - part.start]), targets[i])
                shown.update(len(todo))
    say(args, f"wrote {sum(missing)} pictures to {args.out}")
    finish(args, {"out": args.out, "images": [str(t) for t in targets], "written": sum(missing), "options": mine})


def tile_of(engine: FastDecoder, request: Request, tile: int | None = None) -> int | None:
    """Side of the tiles that ``--max-memory`` makes the engine decode in, when it is asked for ``tile``; None: none."""
    return tile if engine.max_memory is None else engine.plan(request, tile).way.tile or None


def require_tile(expected: int | None, found: int | None) -> None:
    """Raise InputError if an engine that ran out of memory went on in other tiles than the options beside the pictures
    say."""
    if found != expected:
        raise InputError(
            f"memory ran out below --max-memory, and tiles of {found} px would change the rest of the pictures: give a "
            "smaller --max-memory, and --overwrite or another --out"
        )


def recorded(given: dict[str, Any], found: Conditions) -> dict[str, Any]:
    """What of the conditions the pictures depend on; of a file its content."""
    if not given:
        return {}
    plain = {name: value for name, value in given.items() if not isinstance(value, str)}
    files = digest("", {str(i): t for i, t in enumerate(found.tensors)})
    return {"conditions": {**plain, "tensors": files}}


def options_file(output: Path) -> Path:
    """Beside the one picture, or in the folder."""
    return output.with_name(f"{output.name}.json") if output.suffix.lower() in IMAGE_SUFFIXES else output / OPTIONS


def read(source: Path) -> Latents:
    """Latents of one file, or of all files of a folder, whose names then start with the file's.

    The shards that `encode` wrote have the names of one file. Hidden files are what a killed run was writing.
    """
    if not source.is_dir():
        return load_latents(source)
    files = sorted(f for f in source.glob("*.safetensors") if not f.name.startswith("."))
    if not files:
        raise InputError(f"no .safetensors files in {source}")
    parts = [load_latents(f) for f in files]
    if (source / RECORD).exists():
        return concatenate(parts)
    return concatenate([Latents(p.z, [f"{f.stem}/{n}" for n in p.names]) for f, p in zip(files, parts, strict=True)])


def check_finite(latents: Latents) -> None:
    """Before the first picture is written: InputError that names the first image with NaN or Inf."""
    first = first_not_finite(latents.z)
    if first is not None:
        raise InputError(f"latents must be finite, got NaN or Inf for {latents.names[first]!r}")


def output_files(latents: Latents, output: Path) -> list[Path]:
    """Where every picture goes."""
    if output.suffix.lower() in IMAGE_SUFFIXES:
        if len(latents.z) != 1:
            raise InputError(f"--out must be a folder for {len(latents.z)} images, got {output}")
        return [output]
    if output.exists() and not output.is_dir():
        raise InputError(f"--out must be a folder or a picture file, got the file {output}")
    return [output / f"{name}.png" for name in latents.names]
