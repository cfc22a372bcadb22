"""Decode latent tokens to pictures. Resumable: pictures that are already there are skipped.

Image i of the input has seed + i whatever the batch, so an interrupted run continues to the same pictures.
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
    require_writable,
)
from msdd_fast.errors import InputError
from msdd_fast.images import IMAGE_SUFFIXES, save_image, to_image
from msdd_fast.latents import Latents, load_latents
from msdd_fast.noise import resolve_seeds
from msdd_fast.sampling import check_latents

HELP = "latent tokens (.safetensors) -> pictures"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a latents file, or a folder of them")
    parser.add_argument("-o", "--output", default="decoded", help="folder, or a .png for a single image (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="decode again what is already there")
    add_checkpoint(parser)
    add_sampling(parser)
    add_batch_size(parser)


def run(args: argparse.Namespace) -> None:
    latents = read(Path(args.source))
    targets = output_files(latents, Path(args.output))
    require_writable(targets[0] if targets else args.output)
    tokenizer = load_tokenizer(args)
    cfg = tokenizer.config
    check_latents(latents.z, cfg.num_latent_tokens, cfg.latent_dim)
    seeds = resolve_seeds(args.seed, len(latents.z))
    todo = [i for i, path in enumerate(targets) if args.overwrite or not path.exists()]
    if len(todo) < len(targets):
        print(f"{len(targets) - len(todo)} of {len(targets)} are already there")
    with tqdm(total=len(todo), unit="img", disable=None) as bar:
        for part in chunks(len(todo), args.batch_size):
            index = [todo[i] for i in part]
            images = tokenizer.decode(latents.z[index].to(device_of(tokenizer)), seeds[index], args.steps, args.cfg_scale)
            if not images.isfinite().all():
                raise InputError(f"decoding gave NaN or Inf for one of {', '.join(latents.names[i] for i in index)}")
            for i, image in zip(index, images, strict=True):
                save_image(to_image(image), targets[i])
            bar.update(len(part))
    print(f"wrote {len(todo)} pictures to {args.output}")


def read(source: Path) -> Latents:
    """Latents of one file, or of all files of a folder, whose names then start with the file's."""
    if not source.is_dir():
        return load_latents(source)
    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise InputError(f"no .safetensors files in {source}")
    parts = [load_latents(f) for f in files]
    shapes = {tuple(p.z.shape[1:]) for p in parts}
    if len(shapes) > 1:
        raise InputError(f"latents in {source} must agree in shape, got {sorted(shapes)}")
    import torch

    return Latents(
        torch.cat([p.z for p in parts]), [f"{f.stem}/{n}" for f, p in zip(files, parts, strict=True) for n in p.names]
    )


def output_files(latents: Latents, output: Path) -> list[Path]:
    """Where every picture goes."""
    if output.suffix.lower() in IMAGE_SUFFIXES:
        if len(latents.z) != 1:
            raise InputError(f"--output must be a folder for {len(latents.z)} images, got {output}")
        return [output]
    if output.exists() and not output.is_dir():
        raise InputError(f"--output must be a folder or a picture file, got the file {output}")
    return [output / f"{name}.png" for name in latents.names]
