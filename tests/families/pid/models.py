"""Random PiD tokenizers in which no weight is at a trivial value, and inputs for them."""

from __future__ import annotations

import torch

from msdd_fast import Tokenizer
from msdd_fast.families.pid.presets import PID_PRESETS

TINY = PID_PRESETS["tiny-pid"]


def random_tokenizer(config=TINY, seed=0):
    """Every weight is random: linears of about unit gain, norms about 1, gates that let half of the latents through."""
    tokenizer = Tokenizer.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in tokenizer.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                std = 0.3 if "adaLN" in name else 1.0
                p.copy_(std * noise / p[0].numel() ** 0.5)
            else:
                p.copy_(0.1 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return tokenizer


def latents(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def captions(batch, config=TINY, rows=None, seed=9):
    dec = config.decoder
    return latents(batch, dec.text_length if rows is None else rows, dec.text_width, seed=seed)
