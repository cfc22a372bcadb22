"""The limits of a service."""

from __future__ import annotations

import math
from dataclasses import dataclass

from msdd_fast.diffusion.checks import as_int, as_number
from msdd_fast.errors import InputError


@dataclass(frozen=True)
class Settings:
    """What a service accepts, and how long it waits.

    Attributes:
        max_wait: seconds that a request waits for others to share its batch.
        max_queue: images that may wait; requests beyond are refused with 503.
        max_images: of one request; at most max_queue.
        max_pixels: of one image.
        timeout: seconds from the head of a request to its images; then 504.
        token: what ``Authorization: Bearer`` must carry; None for no check.
    """

    max_wait: float = 0.002
    max_queue: int = 256
    max_images: int = 64
    max_pixels: int = 2**22
    timeout: float = 30.0
    token: str | None = None

    def __post_init__(self) -> None:
        for name in ("max_queue", "max_images", "max_pixels"):
            as_int(name, getattr(self, name), 1)
        for name, least in (("max_wait", 0.0), ("timeout", 1e-3)):
            value = as_number(name, getattr(self, name))
            if not math.isfinite(value) or value < least:
                raise InputError(f"{name} must be a finite number of seconds >= {least:g}, got {value!r}")
        if self.max_images > self.max_queue:
            raise InputError(
                f"max_images must be at most max_queue={self.max_queue}, else a request of that many would always be "
                f"refused, got {self.max_images}"
            )
        if self.token is not None and (not self.token or not self.token.isascii() or not self.token.isprintable()):
            raise InputError("token must be printable ASCII and not empty")
