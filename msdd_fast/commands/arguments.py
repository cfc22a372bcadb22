"""Arguments that several subcommands share. Does not import PyTorch, so that help is fast."""

from __future__ import annotations

import argparse

from msdd_fast.io.arguments import DTYPES, byte_size, dtype_name, positive_int

DEFAULT_CHECKPOINT = "msdd-nano-256"
SHARD_SIZE = 8192
"""Images in a shard, unless --shard-size says otherwise."""


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", default=DEFAULT_CHECKPOINT, help="bundled name, directory or hub id (default: %(default)s)"
    )
    parser.add_argument("--device", default=None, help="torch device (default: cuda if there is one, else cpu)")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="image i uses seed + i (default: 0)")
    add_steps_and_guidance(parser)


def add_steps_and_guidance(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=None, help="denoising steps per scale (default: the checkpoint's)")
    parser.add_argument(
        "--cfg-scale", type=float, default=None, help="classifier-free guidance (default: the checkpoint's)"
    )


def add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        type=dtype_name,
        choices=sorted(DTYPES),
        default="bfloat16",
        help="arithmetic of the decoder (default: %(default)s; a CPU without fast bfloat16 calculates in float32)",
    )


def add_batch_size(parser: argparse.ArgumentParser, default: int = 8) -> None:
    parser.add_argument(
        "--batch-size", type=positive_int, default=default, help="images at a time (default: %(default)s)"
    )


def add_max_memory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-memory",
        type=byte_size,
        metavar="SIZE",
        help="limit for weights, activations and images, such as 2GiB or 500MB: fewer images at once, then parts of an "
        "image, at last tiles, which change it (docs/memory.md; default: none)",
    )


def add_strict(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--strict", action="store_true", help="exit with 1, at the end, if an image could not be read")
