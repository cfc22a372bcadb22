"""Arguments and helpers that several subcommands share."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch

from msdd_fast.engine import FastDecoder, accelerate
from msdd_fast.io import arguments
from msdd_fast.io.arguments import dtype_name as dtype_name
from msdd_fast.io.arguments import pick_device as pick_device
from msdd_fast.io.arguments import positive_int as positive_int
from msdd_fast.io.images import load_batch as load_batch
from msdd_fast.tokenizer import Tokenizer

DEFAULT_CHECKPOINT = "msdd-nano"
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in arguments.DTYPES}


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


def load_tokenizer(args: argparse.Namespace) -> Tokenizer:
    """The checkpoint of the command line on its device."""
    device = pick_device(args.device)
    return Tokenizer.from_pretrained(args.checkpoint).to(device)


def load_engine(args: argparse.Namespace, tokenizer: Tokenizer, batch_size: int) -> FastDecoder:
    """The engine for the command line's --dtype, --steps and --cfg-scale."""
    return accelerate(
        tokenizer,
        dtype=DTYPES[args.dtype],
        steps=args.steps,
        cfg_scale=args.cfg_scale,
        batch_sizes=(batch_size,),
    )


def device_of(tokenizer: Tokenizer) -> torch.device:
    return next(tokenizer.parameters()).device


def chunks(count: int, size: int) -> Iterator[range]:
    """Consecutive index ranges of at most ``size``."""
    for first in range(0, count, size):
        yield range(first, min(first + size, count))
