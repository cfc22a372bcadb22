"""Decode latent tokens to pictures. Resumable: pictures that are already there are skipped.

Image i of the input has seed + i whatever the batch. A run that is continued with the same options gives the
same files as one that was never interrupted. The options lie beside the pictures, in decode.json: a run with others is
refused unless --overwrite is given.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from msdd_fast.commands.common import (
    add_batch_size,
    add_checkpoint,
    add_dtype,
    add_sampling,
    chunks,
    load_engine,
    load_tokenizer,
)
from msdd_fast.commands.encode import RECORD
from msdd_fast.commands.record import digest, read_record
from msdd_fast.diffusion.checks import check_latents
from msdd_fast.diffusion.noise import resolve_seeds
from msdd_fast.engine import FastDecoder
from msdd_fast.errors import InputError
from msdd_fast.io.files import require_writable
from msdd_fast.io.images import IMAGE_SUFFIXES, save_image, to_image
from msdd_fast.io.json_files import write_json
from msdd_fast.io.latents import Latents, concatenate, load_latents
from msdd_fast.tokenizer import Tokenizer

OPTIONS = "decode.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a latents file, or a folder of them")
    parser.add_argument(
        "-o", "--output", default="decoded", help="folder, or a .png for a single image (default: %(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="decode again what is already there")
    add_checkpoint(parser)
    add_sampling(parser)
    add_dtype(parser)
    add_batch_size(parser)


def run(args: argparse.Namespace) -> None:
    latents = read(Path(args.source))
    targets = output_files(latents, Path(args.output))
    if targets:
        require_writable(targets[0])
    tokenizer = load_tokenizer(args)
    check_latents(latents.z, *tokenizer.config.latent_shape)
    check_finite(latents)
    seeds = resolve_seeds(args.seed, len(latents.z))
    engine = load_engine(args, tokenizer, args.batch_size)
    mine = options(latents, tokenizer, engine, args.seed, args.dtype)
    record(mine, options_file(Path(args.output)), targets, args.overwrite)
    missing = [args.overwrite or not path.exists() for path in targets]
    if not all(missing):
        print(f"{len(targets) - sum(missing)} of {len(targets)} are already there")
    with tqdm(total=sum(missing), unit="img", disable=None) as bar:
        for part in chunks(len(targets), args.batch_size):
            todo = [i for i in part if missing[i]]
            if todo:
                # All of the batch, as in a run from the start: rounding depends on the batch size.
                index = slice(part.start, part.stop)
                images = engine.decode(latents.z[index], seeds[index])
                if not images.isfinite().all():
                    raise InputError(f"decoding gave NaN or Inf for one of {', '.join(latents.names[index])}")
                for i in todo:
                    save_image(to_image(images[i - part.start]), targets[i])
                bar.update(len(todo))
    print(f"wrote {sum(missing)} pictures to {args.output}")


def options(latents: Latents, tokenizer: Tokenizer, engine: FastDecoder, seed: int, dtype: str) -> dict[str, Any]:
    """Everything that the pictures depend on, other than by rounding."""
    return {
        "latents": digest(json.dumps(latents.names), {"z": latents.z}),
        "model": digest(tokenizer.config.to_json(), tokenizer.decoder.state_dict()),
        "seed": seed,
        "steps": engine.steps,
        "cfg_scale": engine.cfg_scale,
        "dtype": dtype,
        "computed_in": str(engine.dtype).removeprefix("torch."),
    }


def options_file(output: Path) -> Path:
    """Beside the one picture, or in the folder."""
    return output.with_name(f"{output.name}.json") if output.suffix.lower() in IMAGE_SUFFIXES else output / OPTIONS


def record(mine: dict[str, Any], file: Path, targets: list[Path], overwrite: bool) -> None:
    """Write the options down before the first picture.

    Raises InputError if pictures are there that other options, or nobody knows which, have given. With ``overwrite``
    those pictures are removed first: a run that is interrupted must not leave them to be taken for its own.
    """
    theirs = read_record(file)
    if theirs == mine:
        return
    there = [path for path in targets if path.exists()]
    if there and not overwrite:
        if theirs is not None:
            differ = [f"{k} {theirs.get(k)!r} instead of {v!r}" for k, v in mine.items() if theirs.get(k) != v]
            reason = f"was decoded with {', '.join(differ) or 'other options'}"
        else:
            reason = f"is there, and {file} does not say how it was decoded"
        raise InputError(f"{there[0]} {reason}; give --overwrite to decode again, or another --output")
    try:
        for path in there:
            path.unlink()
    except OSError as e:
        raise InputError(f"cannot write {there[0]}: {e.strerror or e}") from e
    write_json(file, mine)


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
    finite = torch.isfinite(latents.z).flatten(1).all(dim=1).tolist()
    if not all(finite):
        raise InputError(f"latents must be finite, got NaN or Inf for {latents.names[finite.index(False)]!r}")


def output_files(latents: Latents, output: Path) -> list[Path]:
    """Where every picture goes."""
    if output.suffix.lower() in IMAGE_SUFFIXES:
        if len(latents.z) != 1:
            raise InputError(f"--output must be a folder for {len(latents.z)} images, got {output}")
        return [output]
    if output.exists() and not output.is_dir():
        raise InputError(f"--output must be a folder or a picture file, got the file {output}")
    return [output / f"{name}.png" for name in latents.names]
