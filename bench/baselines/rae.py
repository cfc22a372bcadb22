"""The decoder of representation autoencoders (RAE): a ViT-XL over DINOv2 tokens."""

from __future__ import annotations

from torch import nn

from msdd_fast.bench.baselines.peer import SIZE, Peer


def _rae() -> nn.Module:
    from diffusers.models.autoencoders import autoencoder_rae

    return autoencoder_rae.RAEDecoder(
        hidden_size=768,
        decoder_hidden_size=1152,
        decoder_num_hidden_layers=28,
        decoder_num_attention_heads=16,
        decoder_intermediate_size=4096,
        patch_size=16,
        image_size=SIZE,
        num_patches=(SIZE // 16) ** 2,
    )


RAE = Peer("RAE ViT-XL", _rae, (256, 768), lambda m, z: m(z).logits, lambda m: [m])
