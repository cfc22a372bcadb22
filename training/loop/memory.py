"""Memory against time: activation checkpointing and torch.compile of the transformer blocks."""

from __future__ import annotations

import functools

import torch
from torch.utils.checkpoint import checkpoint

from msdd_fast.tokenizer import Tokenizer


def prepare_blocks(tokenizer: Tokenizer, compiled: bool, checkpointed: bool) -> None:
    """Every block calculates its activations again in the backward pass, or is compiled, or both; names stay.

    The blocks are those that a network lists as ``blocks``. Compiled for each scale's shapes apart, since a decoder has
    few of them.
    """
    if compiled:
        # One program per scale and kind of block, more than the default limit allows.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for network in (tokenizer.encoder, tokenizer.decoder):
        for block in network.blocks:
            forward = torch.compile(block.forward, dynamic=False) if compiled else block.forward
            if checkpointed:
                forward = functools.partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
            if compiled or checkpointed:
                block.forward = forward
