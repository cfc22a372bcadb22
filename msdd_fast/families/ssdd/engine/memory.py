"""How much memory SSDD's activations take."""

from __future__ import annotations

from msdd_fast.families.ssdd.config import SSDDConfig


def ssdd_activation_bytes(config: SSDDConfig, itemsize: int) -> int:
    """Upper bound on the bytes of one image's activations of an SSDD decoder, without what convolutions take inside.

    Alive at once at most: all skips and the latents' part of the first convolution; in the last level's first residual
    block its input, that normalised, and two results; besides, the modulations, state, velocity and image.
    """
    widths, pixels = config.decoder.widths, config.image_size**2
    skips = sum((2 * w + (widths[max(0, i - 1)])) * pixels // 4**i for i, w in enumerate(widths))
    last = 2 * (widths[1] + widths[0]) + 2 * widths[0]
    ins = [sum(widths) * 4, sum(w + max(w, below) for w, below in zip(widths, (*widths[1:], 0), strict=True)) * 3]
    cells = (2 * sum(ins) + 2 * widths[3] * config.decoder.mid_layers) * pixels // 64
    return (skips + (widths[0] + last) * pixels + cells) * itemsize + 4 * 3 * pixels * 4
