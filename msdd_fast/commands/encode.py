"""Encode pictures to latent tokens, one safetensors file with a name for each picture."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

from msdd_fast.commands.common import add_batch_size, add_checkpoint, chunks, device_of, load_batch, load_tokenizer
from msdd_fast.errors import InputError
from msdd_fast.io.files import require_writable
from msdd_fast.io.images import find_image_files
from msdd_fast.io.latents import Latents, save_latents, unique_names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a picture, or a folder that is searched for pictures")
    parser.add_argument("-o", "--output", default="latents.safetensors", help="file to write (default: %(default)s)")
    add_checkpoint(parser)
    add_batch_size(parser)


def run(args: argparse.Namespace) -> None:
    if Path(args.output).suffix != ".safetensors":
        raise InputError(f"--output must end in .safetensors, got {args.output}")
    require_writable(args.output)
    source = Path(args.source)
    files = find_image_files(source)
    names = unique_names(files, source if source.is_dir() else source.parent)
    tokenizer = load_tokenizer(args)
    size, device = tokenizer.config.image_size, device_of(tokenizer)
    parts = []
    with tqdm(total=len(files), unit="img", disable=None) as bar:
        for part in chunks(len(files), args.batch_size):
            images = load_batch([files[i] for i in part], size).to(device)
            parts.append(tokenizer.encode(images).cpu())
            bar.update(len(part))
    save_latents(Latents(torch.cat(parts), names), args.output)
    print(f"wrote {args.output}: {' x '.join(map(str, (len(files), *parts[0].shape[1:])))}")
