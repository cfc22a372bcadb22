"""Which backends there are, which one is asked for, what can run here, and why the rest cannot.

The compiled extension is looked for on first request, never when the package is imported, and the outcome is kept: a
broken or missing build disturbs nobody who does not ask for it, and everybody who asks hears the reason.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
import platform
from collections.abc import Collection, Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from msdd_fast.errors import BackendUnavailableError, InputError

BACKENDS = ("auto", "eager", "cpu", "triton", "cuda", "sdpa", "flash-attn", "xformers")
_PACKAGE = Path(__file__).resolve().parent


def parse_choice(text: str) -> dict[str, str]:
    """ "triton" or "eager,renoise_upsample=triton": backend of each op; "*" is the rest. Raises InputError."""
    choice = {}
    for part in text.split(","):
        op, _, backend = part.rpartition("=")
        if backend not in BACKENDS:
            raise InputError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
        choice[op or "*"] = backend
    return choice


def check_ops(choice: dict[str, str], known: Collection[str]) -> None:
    """Raise InputError if a backend is chosen for an op that does not exist."""
    for op in choice:
        if op != "*" and op not in known:
            raise InputError(f"backend is chosen for the op {op!r}; known: {', '.join(sorted(known))}")


def environment_choice() -> dict[str, str]:
    """The choice of MSDD_FAST_BACKEND. Raises InputError that names the variable."""
    try:
        return parse_choice(os.environ.get("MSDD_FAST_BACKEND") or "auto")
    except InputError as e:
        raise InputError(f"MSDD_FAST_BACKEND: {e}") from e


# Plain process-wide data: torch.compile guards on it, which it cannot do for a context variable.
_choice: dict[str, str] = environment_choice()


@contextmanager
def use_backend(text: str) -> Iterator[None]:
    """Choose backends inside a ``with`` block, for the whole process: "triton", "eager,renoise_upsample=cpu".

    The block's choice replaces the one outside it, MSDD_FAST_BACKEND's too. A backend named for one op never falls
    back. One named for all ops applies to those that have it; the others take the best they can. Raises InputError
    for an unknown backend or op.
    """
    from msdd_fast import ops

    choice = parse_choice(text)
    check_ops(choice, ops.__all__)
    before = dict(_choice)
    _choice.clear()
    _choice.update(choice)
    try:
        yield
    finally:
        _choice.clear()
        _choice.update(before)


def requested_backend(op: str, argument: str | None, available: Container[str]) -> str:
    """What is asked for: the argument, else ``use_backend`` or MSDD_FAST_BACKEND, else "auto"."""
    if argument is not None:
        if argument not in BACKENDS:
            raise InputError(f"backend must be one of {', '.join(BACKENDS)}, got {argument!r}")
        return argument
    if op in _choice:
        return _choice[op]
    common = _choice.get("*", "auto")
    return common if common == "eager" or common in available else "auto"


def can_use_cpu(x: Tensor) -> tuple[bool, str]:
    """Whether the compiled C++ functions can work on ``x``."""
    if x.device.type != "cpu":
        return False, f"works on CPU tensors, got {x.device}"
    return extension_status()


def can_use_triton(x: Tensor) -> tuple[bool, str]:
    """Whether Triton kernels can work on ``x``: on a GPU, or on a CPU under TRITON_INTERPRET=1 (for tests)."""
    if not _has_module("triton"):
        return False, "Triton is not installed: pip install triton"
    if x.device.type == "cuda" or (x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return True, "Triton kernel"
    return False, f"needs a CUDA tensor (or TRITON_INTERPRET=1, for tests), got {x.device}"


def can_use_cuda(x: Tensor) -> tuple[bool, str]:
    """Whether the extension's CUDA kernels can work on ``x``: built, for this GPU, with a driver that is new enough."""
    if x.device.type != "cuda":
        return False, f"works on CUDA tensors, got {x.device}"
    return cuda_status(x.device.index or 0)


def cuda_status(device: int) -> tuple[bool, str]:
    """Whether the CUDA kernels of ``msdd_fast._C`` run on a GPU, and why not. Raises nothing."""
    return _cuda_status(device)


@functools.cache
def _cuda_status(device: int) -> tuple[bool, str]:
    if torch.version.cuda is None:
        return False, "needs an NVIDIA GPU, and this PyTorch is not built for CUDA"
    module, reason = _probe()
    if module is None:
        return False, reason
    info = build_info()
    if not hasattr(module, "context_attention"):
        return False, f"was built without CUDA: {info.get('cuda_reason')}. To build it: {_rebuild_cuda_command()}"
    return _runs_on(info.get("cuda_archs", []), module.cuda_versions(), torch.cuda.get_device_capability(device))


def _runs_on(archs: list[str], versions: tuple[int, int], capability: tuple[int, int]) -> tuple[bool, str]:
    """The verdict for architectures built ("80"), (driver, runtime) versions (13000), a GPU's compute capability."""
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


def can_use_package(x: Tensor, package: str, module: str, command: str) -> tuple[bool, str]:
    """Whether an optional GPU library is installed and can work on ``x``; ``command`` installs it."""
    if not _has_module(module):
        return False, f"{package} is not installed: {command}"
    if x.device.type != "cuda":
        return False, f"needs a CUDA tensor, got {x.device}"
    return True, package


def _has_module(name: str) -> bool:
    return _find_module(name)


@functools.cache
def _find_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def load_extension() -> ModuleType:
    """The module ``msdd_fast._C``. Raises BackendUnavailableError with the reason and the command that helps."""
    module, reason = _probe()
    if module is None:
        raise BackendUnavailableError(f"backend 'cpu' needs the compiled extension msdd_fast._C, which {reason}")
    return module


def extension_status() -> tuple[bool, str]:
    """Whether ``msdd_fast._C`` can be used, and what it is or why not. Raises nothing."""
    module, reason = _probe()
    return module is not None, reason


def build_info() -> dict[str, Any]:
    """What the install wrote about the build (``_build_info.json``); empty if the package was never installed."""
    try:
        info = json.loads((_PACKAGE / "_build_info.json").read_text())
    except (OSError, ValueError):
        return {}
    return info if isinstance(info, dict) else {}


@functools.cache
def _probe() -> tuple[ModuleType | None, str]:
    info = build_info()
    try:
        module = importlib.import_module("msdd_fast._C")
    except ImportError as error:
        return None, _explain(info, error)
    cuda = f"CUDA {', '.join(info.get('cuda_archs', []))}" if info.get("cuda") else "no CUDA"
    return module, f"was built with {info.get('compiler', 'an unknown compiler')}, {cuda}"


def _explain(info: dict[str, Any], error: ImportError) -> str:
    if not info.get("compiled"):
        reason = info.get("reason") or "the package was never installed, only put on the path"
        return f"was not built: {reason}. To build it: {_rebuild_command()}"
    built, here = str(info.get("python")), platform.python_version()
    if built.split(".")[:2] != here.split(".")[:2]:
        return f"was built for Python {built}, but this is Python {here}. To build it anew: {_rebuild_command()}"
    return f"was built but cannot be loaded: {error}. To build it anew: {_rebuild_command()}"


def _rebuild_command() -> str:
    """Shell command that builds the extension or fails loudly."""
    root = _PACKAGE.parent
    if (root / "setup.py").is_file():
        return f"MSDD_FAST_BUILD_EXT=1 pip install --no-deps -e {root}"
    return "MSDD_FAST_BUILD_EXT=1 pip install --force-reinstall --no-deps --no-binary msdd-fast msdd-fast"


def _rebuild_cuda_command() -> str:
    return f"MSDD_FAST_BUILD_CUDA=1 {_rebuild_command()}"


# A compiled function asks these once, when it is traced. This is what torch.compiler.assume_constant_result does,
# but the decorator imports all of Dynamo, and Triton with it.
for _function in (extension_status, _has_module, cuda_status):
    vars(_function)["_dynamo_marked_constant"] = True
