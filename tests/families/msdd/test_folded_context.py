"""The engine's folded context against the model's own keys and values."""

from dataclasses import replace

import pytest
import torch

from msdd_fast.families import get_preset
from msdd_fast.families.msdd.decoder import Decoder
from msdd_fast.families.msdd.engine.context import fold_context, folded_width, frame

TINY = get_preset("tiny")


def decoder_with(hidden_size, latent_dim):
    """A decoder in float64 whose context norm and biases are not trivial."""
    torch.manual_seed(0)
    config = replace(
        TINY, latent_dim=latent_dim, decoder=replace(TINY.decoder, conditioning="cross", hidden_size=hidden_size)
    )
    decoder = Decoder(config)
    with torch.no_grad():
        for p in decoder.parameters():
            p.normal_(std=0.3)
        decoder.context_norm.weight.add_(1)
    return decoder.double()


@pytest.mark.parametrize(
    ("hidden_size", "latent_dim", "width"),
    [(128, 8, 32), (128, 16, 64), (64, 32, 64), (32, 8, 32), (32, 40, 32)],
)
def test_keys_and_values_are_those_of_the_model(hidden_size, latent_dim, width):
    """Also where the latents have more numbers than the decoder has channels."""
    decoder = decoder_with(hidden_size, latent_dim)
    assert folded_width(hidden_size, latent_dim) == width
    z = torch.randn(5, latent_dim, dtype=torch.float64)
    expected = decoder.context_norm(decoder.context_embed(z))

    folded = fold_context(decoder)
    weight, bias = (p.double() for p in folded.embed)
    assert weight.shape == (width, latent_dim)
    u = z @ weight.T + bias
    u = u / (u.square().mean(dim=1, keepdim=True) + folded.eps).sqrt()
    for block, (weight, bias) in zip(decoder.blocks, folded.kv, strict=True):
        assert weight.shape == (2 * hidden_size, width)
        torch.testing.assert_close(
            u @ weight.double().T + bias.double(), block.context.kv(expected), rtol=2e-6, atol=2e-6
        )


def test_latents_of_zero_meet_the_eps():
    """Without a bias of the embedding their variance is 0: the norm's eps decides, and the result is finite."""
    decoder = decoder_with(64, 8)
    torch.nn.init.zeros_(decoder.context_embed.bias)
    folded = fold_context(decoder)
    assert folded.eps == pytest.approx(decoder.context_norm.eps * 64 / 32)
    z = 1e-4 * torch.randn(3, 8, dtype=torch.float64)
    u = z @ folded.embed[0].double().T
    u = u / (u.square().mean(dim=1, keepdim=True) + folded.eps).sqrt()
    weight, bias = (p.double() for p in folded.kv[0])
    expected = decoder.blocks[0].context.kv(decoder.context_norm(decoder.context_embed(z)))
    torch.testing.assert_close(u @ weight.T + bias, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(("rows", "columns"), [(128, 33), (32, 9), (8, 8)])
def test_a_frame_is_orthonormal_and_flat(rows, columns):
    f = frame(rows, columns)
    torch.testing.assert_close(f.T @ f, torch.eye(columns, dtype=torch.float64), rtol=0, atol=1e-12)
    assert f.abs().max() <= (2 / rows) ** 0.5
