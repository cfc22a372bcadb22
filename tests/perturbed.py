"""A model whose output depends on everything."""

import torch

from msdd_fast import Tokenizer


def perturbed(config="tiny", seed=0):
    """Random weights with every parameter moved, so that no path is trivially zero. In eval mode."""
    torch.manual_seed(seed)
    tok = Tokenizer.from_config(config)
    with torch.no_grad():
        for p in tok.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return tok
