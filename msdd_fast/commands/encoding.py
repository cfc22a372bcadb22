"""What `encode` does: images to one file of latents or to shards of them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from msdd_fast.commands.arguments import SHARD_SIZE
from msdd_fast.commands.bulk.encode import encode_on_ray
from msdd_fast.commands.bulk.options import ray_options
from msdd_fast.commands.common import DTYPES, load_tokenizer
from msdd_fast.commands.output import bar, check_json, finish, say
from msdd_fast.commands.record import prepare_folder
from msdd_fast.commands.shards import RECORD, EncodeJob, names_in, shard_paths, shards_record
from msdd_fast.errors import InputError
from msdd_fast.io.files import as_path, require_writable
from msdd_fast.io.images import find_image_files
from msdd_fast.io.latents import save_latents, unique_names
from msdd_fast.io.safetensors import open_safetensors

MAX_FILE_BYTES = 2**30


def encode(args: argparse.Namespace) -> None:
    check_json(args)
    ray = ray_options(args)
    if ray is not None:
        encode_on_ray(args, ray)
        return
    output = as_path("--out", args.out)
    single = _is_single(output, args.shard_size)
    require_writable(output if single else output / RECORD)
    source = as_path("source", args.source)
    files = find_image_files(source)
    names = unique_names(files, source if source.is_dir() else source.parent)
    tokenizer = load_tokenizer(args)
    kept = 0
    with bar(args, len(files)) as shown:
        job = EncodeJob(tokenizer, files, names, DTYPES[args.dtype], args.batch_size, shown=shown)
        if single:
            latents = job.encode(range(len(files)), limit=MAX_FILE_BYTES)
            job.reader.require_any()
            save_latents(latents, output)
            shape: Sequence[int] = latents.z.shape
            wrote = str(output)
        else:
            shards = _prepare_shards(job, output, args.shard_size or SHARD_SIZE, args.overwrite)
            kept = sum(names_in(path) is not None for path, _ in shards)
            if kept:
                say(args, f"{kept} of {len(shards)} shards are already there")
            shape = _write_shards(job, shards)
            wrote = f"{output}/"
    shape = (len(files) - len(job.reader.unreadable), *shape[1:])
    say(args, f"wrote {wrote}: {' x '.join(map(str, shape))}")
    unreadable = [str(file) for file, _ in job.reader.unreadable]
    result = {"out": args.out, "shape": list(shape), "dtype": args.dtype}
    finish(args, {**result, "unreadable": unreadable, "shards_kept": kept})
    job.reader.report(args.strict)


def _is_single(output: Path, shard_size: int | None) -> bool:
    special = str(output) == "-" or (output.exists() and not output.is_dir() and not output.is_file())
    single = special or output.suffix == ".safetensors"
    if not single and not output.is_dir() and (output.suffix or output.is_file()):
        raise InputError(f"--out must end in .safetensors, got {output} (a name without a suffix is a folder)")
    if single and shard_size is not None:
        raise InputError(f"--shard-size needs a folder as --out, got {output}")
    return single


def _prepare_shards(job: EncodeJob, folder: Path, size: int, overwrite: bool) -> list[tuple[Path, range]]:
    """Shards of ``size`` images each, of which those that are there already are kept."""
    shards = shard_paths(folder, len(job.files), size)
    record = shards_record(job.tokenizer, job.names, job.dtype, size)
    prepare_folder(folder, RECORD, record, overwrite, files="shards", content="latents")
    for path, part in shards:
        there = names_in(path)
        if there is not None and not set(there) <= {job.names[i] for i in part}:
            raise InputError(f"{path} holds other images: use --overwrite, or another folder")
    return shards


def _write_shards(job: EncodeJob, shards: Sequence[tuple[Path, range]]) -> Sequence[int]:
    """Those that are missing. Returns the shape of the latents."""
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
        with open_safetensors(path) as f:
            shape = f.get_slice("latents").get_shape()
    job.reader.require_any()
    return shape
