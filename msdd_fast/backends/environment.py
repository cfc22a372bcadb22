"""What this machine offers and what was found of it (``msdd-fast env``)."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path
from typing import Any

import torch

from msdd_fast.backends.extension import build_info, extension_status

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "safetensors",
    "pillow",
    "flash-attn",
    "xformers",
    "lpips",
    "torchvision",
    "scikit-image",
)


def collect_env() -> dict[str, Any]:
    """Versions, extension status, CPU and devices as plain data. Starts no CUDA context."""
    ok, reason = extension_status()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "extension": "loaded" if ok else f"not available: {reason}",
        "cpu": {"model": _cpu_model(), "cores": os.cpu_count(), "capability": torch.backends.cpu.get_cpu_capability()},
        "torch_threads": torch.get_num_threads(),
        "cuda_build": torch.version.cuda,
        "cuda_devices": torch.cuda.device_count(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("MSDD_FAST_")},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def shortcomings() -> list[str]:
    """What keeps decodes from being as fast as this machine allows, each with its remedy; starts no CUDA context."""
    found = []
    loaded, reason = extension_status()
    if not loaded:
        found.append(f"no C++ ops: msdd_fast._C {reason}")
    if torch.cuda.device_count():
        if importlib.util.find_spec("triton") is None:
            found.append("no Triton kernels, although there is a GPU: pip install triton")
        if loaded and not build_info().get("cuda"):
            found.append(f"no CUDA kernels, although there is a GPU: {build_info().get('cuda_reason')}")
    return found
