"""What the caller has set for its own work has no influence on an engine: autocast and inference mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Disable autocast on ``device``: an engine has a dtype of its own."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


@contextmanager
def building(device: torch.device) -> Iterator[None]:
    """For what is made once and used by all later calls: without autocast, autograd and inference mode.

    Tensors made in inference mode could not be written outside it.
    """
    with torch.inference_mode(False), torch.no_grad(), without_autocast(device):
        yield
