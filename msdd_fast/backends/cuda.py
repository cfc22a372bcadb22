"""Backend "cuda": the CUDA kernels of the compiled extension."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from msdd_fast.backends._constant import constant_when_compiled
from msdd_fast.backends.choice import Verdict, register_backend
from msdd_fast.backends.extension import _probe, _rebuild_cuda_command, build_info


def can_use_cuda(x: Tensor) -> Verdict:
    """Whether the extension's CUDA kernels can work on ``x``: built for its GPU, with a driver that is new enough."""
    if x.device.type != "cuda":
        return False, f"works on CUDA tensors, got {x.device}"
    return cuda_status(x.device.index or 0)


@constant_when_compiled
def cuda_status(device: int) -> Verdict:
    """Whether the CUDA kernels of ``msdd_fast._C`` run on a GPU, and why not. Raises nothing."""
    return _cuda_status(device)


@functools.cache
def _cuda_status(device: int) -> Verdict:
    if torch.version.cuda is None:
        return False, "needs an NVIDIA GPU, and this PyTorch is not built for CUDA"
    module, reason = _probe()
    if module is None:
        return False, reason
    info = build_info()
    if not hasattr(module, "context_attention"):
        return False, f"was built without CUDA: {info.get('cuda_reason')}. To build it: {_rebuild_cuda_command()}"
    return _runs_on(info.get("cuda_archs", []), module.cuda_versions(), torch.cuda.get_device_capability(device))


def _runs_on(archs: list[str], versions: tuple[int, int], capability: tuple[int, int]) -> Verdict:
    """Verdict for the built architectures ("80"), (driver, runtime) versions (13000) and a GPU's compute capability."""
    driver, runtime = (f"{v // 1000}.{v % 1000 // 10}" for v in versions)
    if versions[0] // 1000 < versions[1] // 1000:
        major = versions[1] // 1000
        return False, (
            f"was built with CUDA {runtime}, but the driver knows CUDA {driver}: install a driver for CUDA {major} "
            f"(nvidia-smi shows it), or build with the driver's CUDA: {_rebuild_cuda_command()}"
        )
    here, built = 10 * capability[0] + capability[1], sorted(int(a) for a in archs)
    # Machine code runs on the same major and later minor versions; the newest also has PTX, for all that follow.
    if any(a <= here and a // 10 == here // 10 for a in built) or (built and here >= built[-1]):
        return True, f"CUDA {runtime}, sm_{here}"
    return False, (
        f"was built for sm_{', sm_'.join(archs)}, but this GPU is sm_{here}. "
        f"To build it: MSDD_FAST_CUDA_ARCHS={here} {_rebuild_cuda_command()}"
    )


CUDA = register_backend("cuda", can_use_cuda)
