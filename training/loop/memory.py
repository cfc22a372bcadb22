"""Memory: activation checkpointing, torch.compile of the transformer blocks, and the peak so far."""

from __future__ import annotations

import functools
import math
import sys
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from msdd_fast.tokenizer import Tokenizer


def prepare_blocks(tokenizer: Tokenizer, compiled: bool, checkpointed: bool) -> None:
    """Compile every block, or recompute its activations in the backward pass, or both; parameter names stay.

    Blocks are what a network lists as ``blocks``. Each shape gets a compiled program of its own, since a decoder has
    few of them.
    """
    if compiled:
        # One program per scale and kind of block, more than the default limit allows.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    networks: tuple[Any, ...] = (tokenizer.encoder, tokenizer.decoder)
    for network in networks:
        for block in network.blocks:
            forward = torch.compile(block.forward, dynamic=False) if compiled else block.forward
            if checkpointed:
                forward = functools.partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
            if compiled or checkpointed:
                block.forward = forward


def memory_gib(device: str) -> float:
    """Peak memory so far, in GiB: that of the GPU, or on a CPU the resident memory of this process.

    NaN on a system without the module ``resource``, such as Windows.
    """
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
