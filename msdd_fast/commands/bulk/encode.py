"""``msdd-fast encode --ray``: the shards of ``encode``, by many workers; images may lie in WebDataset shards, too."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from msdd_fast.commands.arguments import SHARD_SIZE
from msdd_fast.commands.bulk.options import RayOptions, absolute_checkpoint
from msdd_fast.commands.bulk.run import MANIFEST, adopt, run_units
from msdd_fast.commands.bulk.sources import Ref, list_images
from msdd_fast.commands.bulk.workers import EncodeWorker, Unit
from msdd_fast.commands.common import DTYPES
from msdd_fast.commands.inputs import ImageReader
from msdd_fast.commands.output import finish, say
from msdd_fast.commands.record import kept_with_results, prepare_folder
from msdd_fast.commands.shards import RECORD, names_in, shard_paths, shards_record
from msdd_fast.errors import InputError
from msdd_fast.io.files import require_writable
from msdd_fast.io.safetensors import open_safetensors
from msdd_fast.tokenizer import Tokenizer


def encode_on_ray(args: argparse.Namespace, options: RayOptions) -> None:
    output = Path(args.out).absolute()  # workers have other working directories
    if output.suffix or (output.exists() and not output.is_dir()):
        raise InputError(f"--out must be a folder with --ray, got {output}")
    refs, names = list_images(Path(args.source).absolute())
    require_writable(output / RECORD)
    tokenizer = Tokenizer.from_pretrained(args.checkpoint)
    size = args.shard_size or SHARD_SIZE
    record = shards_record(tokenizer, names, DTYPES[args.dtype], size)
    units = [
        Unit(part.start, len(part), str(path), names[part.start : part.stop], [list(refs[i]) for i in part])
        for path, part in shard_paths(output, len(refs), size)
    ]
    checkpoint = absolute_checkpoint(args.checkpoint)
    arguments = {"checkpoint": checkpoint, "dtype": DTYPES[args.dtype], "batch": args.batch_size}
    reader, shape = ImageReader(tokenizer.config.image_size), []
    with kept_with_results(output / RECORD, [Path(unit.output) for unit in units]):
        prepare_folder(output, RECORD, record, args.overwrite, files="shards", content="latents")
        if args.overwrite:
            (output / MANIFEST).unlink(missing_ok=True)
        adopt(output, units, _facts)
        for line, _ in run_units(EncodeWorker, arguments, units, output, options):
            reader.count += line["count"]
            for file, reason in line["unreadable"]:
                reader.pass_over(file, reason)
            shape = line["shape"][1:]
        reader.require_any()
    shape = [reader.count - len(reader.unreadable), *shape]
    say(args, f"wrote {output}/: {' x '.join(map(str, shape))}")
    unreadable = [str(file) for file, _ in reader.unreadable]
    finish(args, {"out": args.out, "shape": shape, "dtype": args.dtype, "unreadable": unreadable})
    reader.report(args.strict)


def _facts(unit: Unit) -> dict[str, Any] | None:
    """Of a shard that ``encode`` wrote without Ray, or whose line a kill of this process has cost."""
    found = names_in(Path(unit.output))
    if found is None:
        return None
    there = set(found)
    if not there <= set(unit.names):
        raise InputError(f"{unit.output} holds other images: use --overwrite, or another folder")
    lost = [str(Ref(*r)) for r, name in zip(unit.inputs, unit.names, strict=True) if name not in there]
    reasons = [[name, f"{name} was not readable in an earlier run"] for name in lost]
    with open_safetensors(unit.output) as f:
        return {"shape": f.get_slice("latents").get_shape(), "unreadable": reasons}
