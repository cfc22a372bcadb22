"""Named PiD configurations: every kind of released weights, and a tiny one for tests."""

from __future__ import annotations

from dataclasses import replace

from msdd_fast.diffusion.config import SamplingConfig
from msdd_fast.families.pid.config import LatentFeaturesConfig, PiDConfig, PiDNetworkConfig
from msdd_fast.families.pid.latents import LatentName

_V15_NETWORK = PiDNetworkConfig(rope_reference=(2048, 2048))
_V15_FEATURES = LatentFeaturesConfig(width=1024, padding="replicate", gate="token", pixel_injection=True)
_UNDISTILLED = SamplingConfig(steps=25, cfg_scale=5.0)


def _v1(latents: LatentName, upscale: int = 4) -> PiDConfig:
    return PiDConfig(latents=latents, upscale=upscale)


def _v15(latents: LatentName, unpatchify: int = 1) -> PiDConfig:
    features = replace(_V15_FEATURES, unpatchify=unpatchify)
    return PiDConfig(latents=latents, decoder=_V15_NETWORK, features=features)


_DISTILLED = {
    **{f"pid-{name}": _v1(name) for name in ("flux", "sd3", "sdxl", "flux2", "dinov2")},
    "pid-siglip": _v1("siglip", upscale=8),
    **{f"pid-v15-{name}": _v15(name) for name in ("flux", "qwenimage")},
    "pid-v15-flux2": _v15("flux2", unpatchify=2),
}

PID_PRESETS: dict[str, PiDConfig] = {
    **_DISTILLED,
    # The networks that version 1.5 was distilled from.
    **{
        f"{name}-undistilled": replace(config, sampler="dpm", sampling=_UNDISTILLED)
        for name, config in _DISTILLED.items()
        if name.startswith("pid-v15")
    },
    # Released width with two joint blocks and small images: for measurements on a CPU.
    "pid-v15-flux-d2-512px": PiDConfig(image_size=512, decoder=replace(_V15_NETWORK, depth=2), features=_V15_FEATURES),
    # For tests.
    "tiny-pid": PiDConfig(
        image_size=64,
        latents="sdxl",
        decoder=PiDNetworkConfig(
            hidden_size=32,
            heads=2,
            depth=3,
            pixel_width=4,
            attention_width=32,
            attention_heads=2,
            text_width=24,
            text_length=10,
            rope_reference=(32, 64),
        ),
        features=LatentFeaturesConfig(width=16, blocks=1, padding="replicate", gate="token", pixel_injection=True),
    ),
}
