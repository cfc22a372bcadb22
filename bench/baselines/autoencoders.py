"""Convolutional autoencoders: SD-VAE, DC-AE and TAESD at their published configurations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from msdd_fast.bench.baselines.peer import SIZE, Peer


def _sd_vae() -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=32,
        sample_size=SIZE,
        scaling_factor=0.18215,
    )


def _dc_ae(latent: int, vits: int, channels: Sequence[int], scaling: float) -> Callable[[], nn.Module]:
    """``vits``: levels of EfficientViT blocks after three levels of residual blocks."""

    def build() -> nn.Module:
        from diffusers import AutoencoderDC

        blocks = ("ResBlock",) * 3 + ("EfficientViTBlock",) * vits
        two = (2,) * vits
        return AutoencoderDC(
            latent_channels=latent,
            encoder_block_types=blocks,
            decoder_block_types=blocks,
            encoder_block_out_channels=tuple(channels),
            decoder_block_out_channels=tuple(channels),
            encoder_layers_per_block=(0, 4, 8, *two),
            decoder_layers_per_block=(0, 5, 10, *two),
            encoder_qkv_multiscales=((),) * (3 + vits),
            decoder_qkv_multiscales=((),) * (3 + vits),
            decoder_norm_types=("batch_norm",) * 3 + ("rms_norm",) * vits,
            decoder_act_fns=("relu",) * 3 + ("silu",) * vits,
            scaling_factor=scaling,
        )

    return build


def _taesd() -> nn.Module:
    from diffusers import AutoencoderTiny

    return AutoencoderTiny()


def _sample(model: Any, z: Tensor) -> Tensor:
    out: Tensor = model.decode(z).sample
    return out


def _decoder(model: Any) -> list[nn.Module]:
    return [m for m in (model.decoder, getattr(model, "post_quant_conv", None)) if m is not None]


F32_CHANNELS = (128, 256, 512, 512, 1024, 1024)
F64_CHANNELS = (*F32_CHANNELS, 2048)

AUTOENCODERS = (
    Peer("SD-VAE f8d4", _sd_vae, (4, 32, 32), _sample, _decoder),
    Peer("DC-AE f32c32", _dc_ae(32, 3, F32_CHANNELS, 0.3189), (32, 8, 8), _sample, _decoder),
    Peer("DC-AE f64c128", _dc_ae(128, 4, F64_CHANNELS, 0.2889), (128, 4, 4), _sample, _decoder),
    Peer("TAESD", _taesd, (4, 32, 32), _sample, _decoder),
)
