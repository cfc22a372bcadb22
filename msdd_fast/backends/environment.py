"""What this machine offers and what was found of it (``msdd-fast env``)."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
from pathlib import Path
from typing import Any

import torch

from msdd_fast.backends.extension import build_info, extension_status
from msdd_fast.backends.packages import imports, is_installed

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "safetensors",
    "pillow",
    "flash-attn",
    "xformers",
    "lpips",
    "torch-fidelity",
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
        "usable_cores": usable_cores(),
        "torch_threads": torch.get_num_threads(),
        "thread_problems": thread_problems(),
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


def usable_cores() -> int:
    """Cores that this process may use: those of its affinity, but no more than its cgroup's quota, rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_quota()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def _cgroup_quota() -> float | None:
    """Cores' worth of time that the cgroup (version 2 or 1) allows; None without a limit."""
    root = Path("/sys/fs/cgroup")
    try:
        limit, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            limit, period = ((root / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        except OSError:
            return None
    try:
        return int(limit) / int(period) if int(limit) > 0 and int(period) > 0 else None
    except ValueError:  # "max"
        return None


def thread_problems() -> list[str]:
    """What keeps this process's threads waiting for a core, with the remedy: too many of them, or busy neighbours."""
    found, threads, cores = [], torch.get_num_threads(), usable_cores()
    if threads > cores:
        found.append(f"{threads} threads for {cores} usable cores: torch.set_num_threads({cores})")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > cores and threads > 1 and os.environ.get("OMP_WAIT_POLICY", "").lower() != "passive":
        found.append(
            f"the load of {load:.1f} exceeds the {cores} usable cores: start with OMP_WAIT_POLICY=passive, or "
            "use fewer threads (docs/troubleshooting.md)"
        )
    return found


def shortcomings() -> list[str]:
    """What keeps decodes from being as fast as this machine allows, each with its remedy; starts no CUDA context."""
    found = []
    loaded, reason = extension_status()
    if not loaded:
        found.append(f"no C++ ops: msdd_fast._C {reason}")
    if torch.cuda.device_count():
        if not is_installed("triton"):
            found.append("no Triton kernels, although there is a GPU: pip install triton")
        elif not imports("triton", "Triton")[0]:
            found.append(f"no Triton kernels, although there is a GPU: {imports('triton', 'Triton')[1]}")
        if loaded and not build_info().get("cuda"):
            found.append(f"no CUDA kernels, although there is a GPU: {build_info().get('cuda_reason')}")
    return found
