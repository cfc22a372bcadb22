"""The machine that a result was measured on, as plain data for its JSON."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import torch

from msdd_fast import __version__
from msdd_fast.backends.environment import collect_env
from msdd_fast.bench.timing.ceilings import last_level_cache

ROOT = Path(__file__).resolve().parents[2]
SIMD = ("avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16")
ARM_SIMD = ("asimd", "asimdhp", "bf16", "sve", "i8mm")
GPU_CLOCKS = ("clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")


def machine_info() -> dict[str, Any]:
    """``collect_env`` with SIMD flags, cache, git commit and the GPU."""
    cpu = torch.device("cpu")
    return {
        "msdd_fast": __version__,
        **collect_env(),
        "simd": [flag for flag in (*SIMD, *ARM_SIMD) if flag in _cpu_flags()],
        "last_level_cache": last_level_cache(cpu),
        "commit": git_commit(),
        "gpu": gpu_info() if torch.cuda.is_available() else None,
    }


def gpu_info() -> dict[str, Any]:
    """Name, size and clocks of the current CUDA device."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    wanted = ("driver_version", *GPU_CLOCKS)
    answer = _output(["nvidia-smi", f"--query-gpu={','.join(wanted)}", "--format=csv,noheader"])
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "l2": properties.L2_cache_size,
        **dict(
            zip(wanted, (part.strip() for part in answer.splitlines()[0].split(",")), strict=False) if answer else ()
        ),
    }


def git_commit() -> str | None:
    """Hash of HEAD, with "+changes" if files differ from it; None outside a checkout."""
    head = _output(["git", "-C", str(ROOT), "rev-parse", "HEAD"])
    changed = _output(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"])
    return (head + ("+changes" if changed else "")) if head else None


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split(":")[1].split()) for line in lines if line.startswith(("flags", "Features"))), set())


def _output(command: list[str]) -> str:
    """Output of a command; empty if it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
