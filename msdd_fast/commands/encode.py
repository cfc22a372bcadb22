"""Encode images to latents with a name for each image.

An --output that ends in .safetensors is one file, for sets whose latents fit into memory. Any other is a folder of
shards (000000.safetensors, ...), which `decode` reads whole. A run that was interrupted goes on with the first shard
that is missing and gives the same shards. Images are turned as EXIF says, converted to sRGB by their ICC profile and
composited on white where they are transparent; of 16 bits the upper 8 count. Images that cannot be read are passed over
and counted. The encoder runs in plain PyTorch: there is no engine for encoders.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from msdd_fast.commands.common import (
    DTYPES,
    add_batch_size,
    add_checkpoint,
    chunks,
    device_of,
    load_tokenizer,
    positive_int,
)
from msdd_fast.commands.inputs import ImageReader, add_strict, encode, require_finite
from msdd_fast.commands.record import digest, read_record
from msdd_fast.errors import InputError
from msdd_fast.io.files import as_path, require_writable
from msdd_fast.io.images import find_image_files
from msdd_fast.io.json_files import write_json
from msdd_fast.io.latents import Latents, save_latents, unique_names
from msdd_fast.tokenizer import Tokenizer

MAX_FILE_BYTES = 2**30
SHARD_SIZE = 8192
RECORD = "encode.json"


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


def run(args: argparse.Namespace) -> None:
    output = as_path("--output", args.output)
    single = _is_single(output, args.shard_size)
    require_writable(output if single else output / RECORD)
    source = as_path("source", args.source)
    files = find_image_files(source)
    names = unique_names(files, source if source.is_dir() else source.parent)
    tokenizer = load_tokenizer(args)
    job = _Job(tokenizer, files, names, DTYPES[args.dtype], args.batch_size)
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


class _Job:
    """What is to be encoded, and how."""

    def __init__(
        self, tokenizer: Tokenizer, files: list[Path], names: list[str], dtype: torch.dtype, batch_size: int
    ) -> None:
        self.tokenizer, self.files, self.names = tokenizer, files, names
        self.dtype, self.batch_size = dtype, batch_size
        self.reader = ImageReader(tokenizer.config.image_size)
        self.bar = tqdm(total=len(files), unit="img", disable=None)

    def encode(self, index: range, limit: int | None = None) -> Latents:
        """The latents of these files, as far as they can be read. Raises InputError if they exceed ``limit`` bytes."""
        parts: list[Tensor] = []
        names: list[str] = []
        for part in chunks(len(index), self.batch_size):
            files = [self.files[index[i]] for i in part]
            read, images = self.reader.read(files)
            z = encode(self.tokenizer, images.to(device_of(self.tokenizer)), [files[i] for i in read])
            z = z.to("cpu", self.dtype)
            require_finite(f"rounding to {str(self.dtype).removeprefix('torch.')}", z, [files[i] for i in read])
            parts.append(z)
            names += [self.names[index[part.start + i]] for i in read]
            needed = len(index) * z[:1].nbytes
            if limit is not None and needed > limit:
                raise InputError(
                    f"--output must be a folder for latents of more than {limit / 2**30:g} GiB, got one file for "
                    f"{needed / 2**30:.1f} GiB"
                )
            self.bar.update(len(part))
        return Latents(torch.cat(parts), names)


def _write_shards(job: _Job, folder: Path, size: int, overwrite: bool) -> Sequence[int]:
    """Shards of ``size`` images each; those that are there already are kept. Returns the shape of the latents."""
    shards = [(folder / f"{i:06d}.safetensors", part) for i, part in enumerate(chunks(len(job.files), size))]
    _prepare(folder, _record(job, size), overwrite)
    kept = 0
    for path, part in shards:
        there = _names_in(path)
        if there is None:
            continue
        if not set(there) <= {job.names[i] for i in part}:
            raise InputError(f"{path} holds other images: use --overwrite, or another folder")
        kept += 1
    if kept:
        print(f"{kept} of {len(shards)} shards are already there")
    shape: Sequence[int] = ()
    for path, part in shards:
        there = _names_in(path)
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


def _record(job: _Job, size: int) -> dict[str, object]:
    """What the shards of a folder depend on."""
    return {
        "encoder": digest("", job.tokenizer.encoder.state_dict()),
        "image_size": job.tokenizer.config.image_size,
        "dtype": str(job.dtype).removeprefix("torch."),
        "shard_size": size,
        "images": len(job.files),
        "names": digest(json.dumps(job.names)),
    }


def _prepare(folder: Path, record: dict[str, object], overwrite: bool) -> None:
    """Leave ``record`` in the folder. Raises InputError if the folder's latents are of something else."""
    # Hidden files are what a killed run was writing.
    there = {p.name for p in folder.glob("*.safetensors") if not p.name.startswith(".")}
    foreign = sorted(n for n in there if not re.fullmatch(r"\d{6,}\.safetensors", n))
    if foreign:
        raise InputError(f"{folder} must hold nothing but shards of this command, got {foreign[0]}")
    if overwrite:
        for name in there:
            (folder / name).unlink()
    elif there:
        before = read_record(folder / RECORD) or {}
        differ = [name for name in record if before.get(name) != record[name]]
        if differ:
            raise InputError(
                f"{folder} holds latents of another run (other {', '.join(differ)}): use --overwrite, or another folder"
            )
    write_json(folder / RECORD, record)


def _names_in(path: Path) -> list[str] | None:
    """The names in a shard; None if there is no such file, or it does not load."""
    try:
        with safe_open(path, framework="pt") as f:
            if "latents" not in f.keys():  # noqa: SIM118 (not a dict)
                return None
            names = json.loads((f.metadata() or {}).get("names", "null"))
    except (OSError, ValueError, SafetensorError):
        return None
    return names if isinstance(names, list) and all(isinstance(n, str) for n in names) else None
