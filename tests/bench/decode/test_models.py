"""Models with random weights: what they decode depends on all of their matrices."""

import pytest
import torch

from msdd_fast import Tokenizer
from msdd_fast.bench.decode.models import conditions, load, random_latents


@pytest.mark.parametrize("name", ["tiny", "tiny-ssdd", "tiny-pid"])
def test_no_matrix_is_zero(name):
    tokenizer = load(name, torch.device("cpu"))
    assert all(p.any() for p in tokenizer.parameters() if p.ndim > 1)
    fresh = Tokenizer.from_config(name)
    assert any(not p.any() for p in fresh.parameters() if p.ndim > 1)  # as training starts
    z = random_latents(tokenizer.config, 1, torch.device("cpu"))
    image = tokenizer.decode(z, seed=0, **conditions(tokenizer.config))
    with torch.no_grad():
        for p in tokenizer.decoder.parameters():
            p.mul_(1.1)
    assert (tokenizer.decode(z, seed=0, **conditions(tokenizer.config)) - image).abs().max() > 1e-3
