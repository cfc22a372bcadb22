"""Encode images to latents with a name for each image.

An --output that ends in .safetensors is one file, for sets whose latents fit into memory. Any other is a folder of
shards (000000.safetensors, ...), which `decode` reads whole. A run that was interrupted goes on with the first shard
that is missing and gives the same shards. Images are turned as EXIF says, converted to sRGB by their ICC profile and
composited on white where they are transparent; of 16 bits the upper 8 count. Images that cannot be read are passed over
and counted. The encoder runs in plain PyTorch: there is no engine for encoders.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open

from msdd_fast.commands.bulk.encode import encode_on_ray
from msdd_fast.commands.bulk.options import add_ray, ray_options
from msdd_fast.commands.common import (
    DTYPES,
    add_batch_size,
    add_checkpoint,
    load_tokenizer,
    positive_int,
)
from msdd_fast.commands.inputs import add_strict
from msdd_fast.commands.shards import (
    RECORD,
    SHARD_SIZE,
    EncodeJob,
    names_in,
    prepare_folder,
    shard_paths,
    shards_record,
)
from msdd_fast.errors import InputError
from msdd_fast.io.files import as_path, require_writable
from msdd_fast.io.images import find_image_files
from msdd_fast.io.latents import save_latents, unique_names

MAX_FILE_BYTES = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="an image, or a folder that is searched for images")
    parser.add_argument(
        "-o",
        "--output",
        default="latents.safetensors",
        help="a .safetensors file, or a folder for shards (default: %(default)s)",
    )
    parser.add_argument(
        "--shard-size", type=positive_int, help=f"images in a shard of a folder (default: {SHARD_SIZE})"
    )
    parser.add_argument(
        "--dtype", choices=sorted(DTYPES), default="float32", help="of the stored latents (default: %(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="encode again what is already in the folder")
    add_strict(parser)
    add_checkpoint(parser)
    add_batch_size(parser)
    add_ray(parser)


def run(args: argparse.Namespace) -> None:
    ray = ray_options(args)
    if ray is not None:
        encode_on_ray(args, ray)
        return
    output = as_path("--output", args.output)
    single = _is_single(output, args.shard_size)
    require_writable(output if single else output / RECORD)
    source = as_path("source", args.source)
    files = find_image_files(source)
    names = unique_names(files, source if source.is_dir() else source.parent)
    tokenizer = load_tokenizer(args)
    job = EncodeJob(tokenizer, files, names, DTYPES[args.dtype], args.batch_size)
    if single:
        latents = job.encode(range(len(files)), limit=MAX_FILE_BYTES)
        job.reader.require_any()
        save_latents(latents, output)
        shape: Sequence[int] = latents.z.shape
        wrote = str(output)
    else:
        shape = _write_shards(job, output, args.shard_size or SHARD_SIZE, args.overwrite)
        wrote = f"{output}/"
    count = len(files) - len(job.reader.unreadable)
    stream = sys.stderr if str(output) == "-" else sys.stdout
    print(f"wrote {wrote}: {' x '.join(map(str, (count, *shape[1:])))}", file=stream)
    job.reader.report(args.strict)


def _is_single(output: Path, shard_size: int | None) -> bool:
    special = str(output) == "-" or (output.exists() and not output.is_dir() and not output.is_file())
    single = special or output.suffix == ".safetensors"
    if not single and not output.is_dir() and (output.suffix or output.is_file()):
        raise InputError(f"--output must end in .safetensors, got {output} (a name without a suffix is a folder)")
    if single and shard_size is not None:
        raise InputError(f"--shard-size needs a folder as --output, got {output}")
    return single


def _write_shards(job: EncodeJob, folder: Path, size: int, overwrite: bool) -> Sequence[int]:
    """Shards of ``size`` images each; those that are there already are kept. Returns the shape of the latents."""
    shards = shard_paths(folder, len(job.files), size)
    prepare_folder(folder, shards_record(job.tokenizer, job.names, job.dtype, size), overwrite)
    kept = 0
    for path, part in shards:
        there = names_in(path)
        if there is None:
            continue
        if not set(there) <= {job.names[i] for i in part}:
            raise InputError(f"{path} holds other images: use --overwrite, or another folder")
        kept += 1
    if kept:
        print(f"{kept} of {len(shards)} shards are already there")
    shape: Sequence[int] = ()
    for path, part in shards:
        there = names_in(path)
        if there is None:
            latents = job.encode(part)
            save_latents(latents, path)
            shape = latents.z.shape
            continue
        done = set(there)
        job.reader.count += len(part)
        for i in part:
            if job.names[i] not in done:
                job.reader.pass_over(job.files[i], f"{job.files[i]} was not readable in an earlier run")
        job.bar.update(len(part))
        with safe_open(path, framework="pt") as f:
            shape = f.get_slice("latents").get_shape()
    job.reader.require_any()
    return shape
