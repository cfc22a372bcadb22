"""Decode latent tokens to pictures. Resumable: pictures that are already there are skipped.

Image i of the input has seed + i whatever the batch. A run that is continued with the same options gives the
same files as one that was never interrupted. The options lie beside the pictures, in decode.json: a run with others is
refused unless --overwrite is given.
"""

from __future__ import annotations

import argparse

from msdd_fast.commands.arguments import (
    SHARD_SIZE,
    add_batch_size,
    add_checkpoint,
    add_dtype,
    add_max_memory,
    add_sampling,
)
from msdd_fast.commands.bulk.options import add_ray
from msdd_fast.commands.output import add_json
from msdd_fast.io.arguments import positive_int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a latents file, or a folder of them")
    parser.add_argument(
        "-o", "--out", default="decoded", help="folder, or a .png for a single image (default: %(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="decode again what is already there")
    parser.add_argument("--shards", action="store_true", help="with --ray: WebDataset shards of PNG files")
    parser.add_argument("--shard-size", type=positive_int, help=f"images in a shard (default: {SHARD_SIZE})")
    add_ray(parser)
    add_checkpoint(parser)
    add_sampling(parser)
    add_dtype(parser)
    add_batch_size(parser)
    add_max_memory(parser)
    add_json(parser, "what was written")
    others = parser.add_argument_group("options of single families (PiD; docs/pid.md)")
    others.add_argument("--text-features", metavar="FILE", help="features of the caption, for all images")
    others.add_argument(
        "--null-text-features", metavar="FILE", help="features to guide away from, with --cfg-scale other than 1"
    )
    others.add_argument("--sigma", type=float, help="noise level of the latents (default: 0)")
    others.add_argument("--height", type=positive_int, help="of the images (default: as the latents say)")
    others.add_argument("--width", type=positive_int, help="of the images (default: as the latents say)")


def run(args: argparse.Namespace) -> None:
    from msdd_fast.commands.decoding import decode

    decode(args)
