"""Encode images to latents with a name for each image.

An --out that ends in .safetensors is one file, for sets whose latents fit into memory. Any other is a folder of
shards (000000.safetensors, ...), which `decode` reads whole. A run that was interrupted goes on with the first shard
that is missing and gives the same shards. Images are turned as EXIF says, converted to sRGB by their ICC profile and
composited on white where they are transparent; of 16 bits the upper 8 count. Images that cannot be read are passed over
and counted. The encoder runs in plain PyTorch: there is no engine for encoders.
"""

from __future__ import annotations

import argparse

from msdd_fast.commands.arguments import SHARD_SIZE, add_batch_size, add_checkpoint, add_strict
from msdd_fast.commands.bulk.options import add_ray
from msdd_fast.commands.output import add_json
from msdd_fast.io.arguments import DTYPES, positive_int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="an image, or a folder that is searched for images")
    parser.add_argument(
        "-o",
        "--out",
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
    add_json(parser, "what was written")


def run(args: argparse.Namespace) -> None:
    from msdd_fast.commands.encoding import encode

    encode(args)
