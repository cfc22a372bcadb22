"""The fast tier: linears of 8 bits, all of them or none, and what they cost in picture quality, measured.

Loss is what a user would see: how much less PSNR a reconstruction has. If the tier's own error is independent of the
reconstruction's, their mean squares add, and

    loss = 10 log10(1 + mse(fast, exact) / mse_ref)  dB,        mse_ref = 4 / 10^2.5 on [-1, 1]

where mse_ref is a reconstruction of 25 dB, which is what msdd-nano reaches. The same error costs a better model
more.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from msdd_fast.diffusion.checks import check_latents
from msdd_fast.engine.batching import split_evenly
from msdd_fast.engine.report import Accuracy, Engine, random_latents
from msdd_fast.errors import AccuracyError, BackendUnavailableError, InputError
from msdd_fast.families import family_of
from msdd_fast.io.photographs import photographs
from msdd_fast.layers.linear import fp8, int8
from msdd_fast.layers.linear.base import MakeLinear
from msdd_fast.layers.linear.dense import DenseLinear
from msdd_fast.ops import Ops
from msdd_fast.tokenizer import Tokenizer

REFERENCE_PSNR = 25.0
BATCH = 8


class Tier(NamedTuple):
    """How the blocks' linears are made, and what the report says of it."""

    name: str
    make: MakeLinear
    description: str


EXACT = Tier("exact", DenseLinear, "the eager model's arithmetic up to rounding")


class Calibration(NamedTuple):
    """Latents (B, L, C) to measure the loss on, and where they come from."""

    z: Tensor
    source: str


def fast_tier(tokenizer: Tokenizer, device: torch.device, dtype: torch.dtype, ops: Ops) -> Tier:
    """float8 on a GPU (dtype bfloat16), int8 on a CPU.

    Raises BackendUnavailableError if the family or the device cannot, or if one linear of the decoder cannot: it names
    that one. InputError for another dtype.
    """
    family = family_of(tokenizer.config)
    _require(not family.no_fast_tier, family.no_fast_tier)
    if _is_cpu(device):
        _require(*int8.available(dtype))
        return Tier("fast", int8.int8_linear, int8.description())
    _require(*fp8.available(device))
    if dtype != torch.bfloat16:
        raise InputError(f"dtype must be torch.bfloat16 with tier='fast' on a GPU, got {dtype}")
    for name, weight in family.quantizable(tokenizer.decoder):
        reason = fp8.unsuitable(name, weight)
        _require(reason is None, reason or "")
    return Tier("fast", partial(fp8.Fp8Linear, quantize=ops.quantize_rows), fp8.DESCRIPTION)


def calibration_latents(tokenizer: Tokenizer, given: Tensor | None) -> Calibration:
    """Those given, else the bundled photographs encoded, else (scikit-image is not installed) random ones.

    Raises InputError for latents that are not the model's, or none.
    """
    config = tokenizer.config
    if given is not None:
        try:
            check_latents(given, *config.latent_shape)
        except InputError as e:
            raise InputError(f"calibration: {e}") from e
        if not len(given):
            raise InputError("calibration must hold at least one image's latents, got none")
        return Calibration(given, f"{len(given)} given latents")
    parameter = next(tokenizer.parameters())
    try:
        images = photographs(config.image_size)
    except InputError:
        return Calibration(random_latents(family_of(config), BATCH), "random latents")
    return Calibration(tokenizer.encode(images.to(parameter)), f"{len(images)} encoded photographs")


@torch.no_grad()
def plain_images(engine: Engine, z: Tensor) -> Tensor:
    """Images in [-1, 1] of ``engine`` without graphs, seeds 0, 1, ...; float32 on the CPU."""
    images, begin = [], 0
    for chunk in split_evenly(len(z), BATCH):
        part = z[begin : begin + chunk.images]
        decoded = engine.program.decode(engine.inputs(part, begin), engine.request(part))
        images.append(decoded.clamp(-1, 1).cpu())
        begin += chunk.images
    return torch.cat(images)


def expected_loss(mse: float) -> float:
    """dB that an error of mean square ``mse`` takes from a reconstruction of REFERENCE_PSNR."""
    return 10 * math.log10(1 + mse / (4 / 10 ** (REFERENCE_PSNR / 10)))


def measure(fast: Tensor, exact: Tensor, source: str) -> Accuracy:
    """What the fast tier's images differ by from the exact ones, over all of them."""
    difference = fast - exact
    mse = float(difference.double().square().mean())
    psnr = 10 * math.log10(4 / max(mse, 1e-12))
    return Accuracy(f"exact tier, {source}", float(difference.abs().max()), psnr, expected_loss(mse))


def require(accuracy: Accuracy, limit: float) -> None:
    """Raise AccuracyError for an expected loss above ``limit`` dB. NaN is above."""
    loss = accuracy.expected_loss
    if loss is None or not loss <= limit:
        raise AccuracyError(
            f"max_psnr_loss is {limit:g} dB, but tier='fast' is expected to lose {loss:.3f} dB (it has a PSNR of "
            f"{accuracy.psnr:.1f} dB against the {accuracy.against}): use tier='exact' or allow more"
        )


def check_limit(max_psnr_loss: float) -> None:
    """Raise InputError unless it is a finite number >= 0."""
    number = isinstance(max_psnr_loss, (int, float)) and not isinstance(max_psnr_loss, bool)
    if not number or not (math.isfinite(max_psnr_loss) and max_psnr_loss >= 0):
        raise InputError(f"max_psnr_loss must be a finite number >= 0, got {max_psnr_loss!r}")


def _is_cpu(device: torch.device) -> bool:
    return device.type == "cpu"


def _require(ok: bool, reason: str) -> None:
    if not ok:
        raise BackendUnavailableError(f"tier='fast' cannot be had: {reason}; use tier='exact'")
