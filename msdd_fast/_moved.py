"""Import paths of version 0.1: they work until 0.3, with a DeprecationWarning that names the new path."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_FAMILIES = (
    "families",
    *("families.msdd.config", "families.msdd.presets", "families.ssdd.config", "families.ssdd.presets"),
)
# Old module -> the modules that have its names now, in the order in which they are searched.
MOVED: dict[str, tuple[str, ...]] = {
    "authors": ("families.msdd.released",),
    "cli": ("commands.main",),
    "config": (*_FAMILIES, "diffusion.config"),
    "engine.fast_decoder": ("engine.decoder",),
    "engine.program": ("layers.request", "families.msdd.engine.program"),
    "env": ("backends.environment",),
    "files": ("io.files", "io.torch_files"),
    "images": ("io.images", "ops._patches"),
    "latents": ("io.latents",),
    "lpips_vgg": ("metrics.lpips",),
    "models": (),
    "models.decoder": ("families.msdd.decoder",),
    "models.embeddings": ("families.msdd.embeddings", "diffusion.sinusoids"),
    "models.encoder": ("families.msdd.encoder",),
    "models.kl_encoder": ("families.ssdd.encoder",),
    "models.mmdit": ("families.msdd.mmdit",),
    "models.position_prior": ("families.msdd.position_prior",),
    "models.rope": ("diffusion.rope",),
    "models.ssdd": ("families.ssdd.decoder",),
    "models.tokenizer": ("tokenizer", "diffusion.checks"),
    "noise": ("diffusion.noise",),
    "ops._op": ("ops._registry",),
    "patch_rows": ("diffusion.patch_rows",),
    "photographs": ("io.photographs",),
    "ranges": ("profiling",),
    "reconstruct": ("commands.reconstruction",),
    "schedule": ("diffusion.schedule",),
    "selection": ("backends.tuned",),
    "ssdd_weights": ("families.ssdd.released",),
    "training.perceptual": ("training.losses.perceptual",),
    "training.ssdd": (
        *("training.recipes.ssdd_flow", "training.recipes.ssdd_distill"),
        *("training.recipes.ssdd_objective", "training.recipes.ssdd_alignment"),
    ),
    "training.stage1": ("training.recipes.msdd_stage1",),
    "training.stage2": ("training.recipes.msdd_stage2", "training.recipes.msdd_unroll"),
    "training.trainer": (
        *("training.loop.trainer", "training.loop.config", "training.loop.objective"),
        *("training.loop.optimizers", "training.loop.ema"),
    ),
}


class _Module(ModuleType):
    """Has the names of the modules that took the old one's place."""

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__"):
            for new in MOVED[self.__name__.removeprefix("msdd_fast.")]:
                module = importlib.import_module(f"msdd_fast.{new}")
                if hasattr(module, name):
                    return getattr(module, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


class _Finder:
    """Finds the old modules and loads them. It stands last: nothing that exists is hidden.

    Without the base classes of importlib.abc, whose import would be most of the time that ``import msdd_fast`` takes.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, old = fullname.partition(".")
        if package != "msdd_fast" or old not in MOVED:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=old == "models")  # type: ignore[arg-type]

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        new = MOVED[module.__name__.removeprefix("msdd_fast.")]
        if new:
            first = importlib.util.find_spec(f"msdd_fast.{new[0]}")
            module.__file__ = None if first is None else first.origin
            places = " or ".join(f"msdd_fast.{n}" for n in new)
            warnings.warn(
                f"{module.__name__} has moved and will be gone in 0.3: import from {places}",
                DeprecationWarning,
                stacklevel=2,  # the import statement: Python passes over importlib's own frames
            )


# Functions of version 0.1 -> what does the same now.
FUNCTIONS = {
    "checkpoint.export_ssdd": "Tokenizer.export_released",
    "checkpoint.import_authors": "Tokenizer.from_authors_checkpoint",
    "checkpoint.import_ssdd": "Tokenizer.from_ssdd_checkpoint",
    "checkpoint.load_pretrained": "Tokenizer.from_pretrained",
}


def function(old_module: str, name: str) -> Any:
    """A function of version 0.1 in a module that is still there. Raises AttributeError if there was none."""
    new = FUNCTIONS.get(f"{old_module}.{name}")
    if new is None:
        raise AttributeError(f"module 'msdd_fast.{old_module}' has no attribute {name!r}")
    message = f"msdd_fast.{old_module}.{name} will be gone in 0.3: use msdd_fast.{new}"
    warnings.warn(message, DeprecationWarning, stacklevel=3)
    tokenizer = importlib.import_module("msdd_fast.tokenizer")
    found = tokenizer
    for part in new.split("."):
        found = getattr(found, part)
    return found


def module(name: str) -> Any:
    """``msdd_fast.<name>`` of version 0.1. Raises AttributeError if there was no such module."""
    if name not in MOVED or not MOVED[name]:
        raise AttributeError(f"module 'msdd_fast' has no attribute {name!r}")
    return importlib.import_module(f"msdd_fast.{name}")


def install() -> None:
    """Make the old paths importable."""
    if not any(isinstance(f, _Finder) for f in sys.meta_path):
        sys.meta_path.append(_Finder())
