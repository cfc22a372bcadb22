"""PiD as the VAE of a pipeline of diffusers: a drop-in that upscales."""

import pytest
import torch

from msdd_fast import accelerate
from msdd_fast.errors import InputError
from tests.families.pid.models import captions, latents, random_tokenizer

pytest.importorskip("diffusers", reason="needs diffusers (the extra [diffusers])")


def test_as_vae():
    from msdd_fast.integrations.diffusers import as_vae

    tok, z, text = random_tokenizer(), latents(2, 4, 1, 2), captions(1)
    for model in (tok, accelerate(tok, dtype=torch.float32)):
        vae = as_vae(model, decode_options={"text": text, "steps": None})
        assert vae.config.latent_channels == 4 and len(vae.config.block_out_channels) == 4  # a cell of 8 pixels
        images = vae.decode(z).sample
        assert images.shape == (2, 3, 32, 64)
        torch.testing.assert_close(images, model.decode(z, text=text), rtol=0, atol=1e-5)
        vae.enable_slicing()
        torch.testing.assert_close(vae.decode(z).sample, images, rtol=0, atol=1e-5)
        with pytest.raises(InputError, match="no encoder: it decodes latents of the VAE of SDXL"):
            vae.encode(torch.zeros(1, 3, 64, 64))
