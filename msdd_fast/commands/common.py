"""Helpers that several subcommands share."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch

from msdd_fast.engine import FastDecoder, accelerate
from msdd_fast.io import arguments
from msdd_fast.io.arguments import pick_device as pick_device
from msdd_fast.io.images import load_batch as load_batch
from msdd_fast.tokenizer import Tokenizer

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in arguments.DTYPES}


def load_tokenizer(args: argparse.Namespace) -> Tokenizer:
    """The checkpoint of the command line on its device."""
    device = pick_device(args.device)
    return Tokenizer.from_pretrained(args.checkpoint).to(device)


def load_engine(
    args: argparse.Namespace, tokenizer: Tokenizer, batch_size: int, max_memory: int | None = None
) -> FastDecoder:
    """The engine for the command line's --dtype, --steps and --cfg-scale."""
    return accelerate(
        tokenizer,
        dtype=DTYPES[args.dtype],
        steps=args.steps,
        cfg_scale=args.cfg_scale,
        batch_sizes=(batch_size,),
        max_memory=max_memory,
    )


def device_of(tokenizer: Tokenizer) -> torch.device:
    return next(tokenizer.parameters()).device


def chunks(count: int, size: int) -> Iterator[range]:
    """Consecutive index ranges of at most ``size``."""
    for first in range(0, count, size):
        yield range(first, min(first + size, count))
