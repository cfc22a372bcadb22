"""One decoder of another project: how to build it, and its size by torch's counter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from msdd_fast.io.packages import import_package

SIZE = 256
"""Pixels per side of all images in the comparison."""


@dataclass(frozen=True)
class Peer:
    """A decoder of 256x256 images.

    Attributes:
        build: makes the model, with random weights, on the current device.
        latent: shape of one image's latents.
        decode: (model, latents) to images or whatever the model's last layer gives.
        decoder: (model) to the modules whose parameters count and which torch.compile takes.
        evaluate: one of the two evaluations of a decoder whose ``decode`` cannot run on meta tensors.
    """

    name: str
    build: Callable[[], nn.Module]
    latent: tuple[int, ...]
    decode: Callable[[Any, Tensor], Tensor]
    decoder: Callable[[Any], list[nn.Module]]
    evaluate: Callable[[Any], Tensor] | None = None


def count_flops(run: Callable[[], Any]) -> int:
    """FLOP of one call: matrix products, convolutions and attention."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        run()
    return int(counter.get_total_flops())


def import_diffusers() -> ModuleType:
    """diffusers, with its autoencoders imported. Raises InputError if it is not installed or does not import."""
    import_package("diffusers.models.autoencoders", "diffusers", "peers")
    return import_package("diffusers", "diffusers", "peers")


def size_of(peer: Peer) -> dict[str, int]:
    """{"parameters": of the decoder, "flops": of one image}, counted on meta tensors."""
    import_diffusers()
    with torch.device("meta"):
        model = peer.build().eval().requires_grad_(False)
        evaluate = peer.evaluate
        if evaluate is not None:
            flops = 2 * count_flops(lambda: evaluate(model))
        else:
            flops = count_flops(lambda: peer.decode(model, torch.empty(1, *peer.latent)))
    parameters = sum(p.numel() for module in peer.decoder(model) for p in module.parameters())
    return {"parameters": parameters, "flops": flops}


def build(peer: Peer, device: torch.device, dtype: torch.dtype, batch: int) -> tuple[nn.Module, Tensor]:
    """The decoder with random weights, and random latents."""
    import_diffusers().utils.logging.set_verbosity_error()  # it warns of a cast that changes nothing
    torch.manual_seed(0)
    model = peer.build().eval().requires_grad_(False).to(device, dtype)
    return model, torch.randn(batch, *peer.latent, device=device, dtype=dtype)
