"""Decoders as programs that run without msdd-fast: torch.export, AOTInductor, ONNX (docs/integrations.md).

What is exported is the eager model with every op in plain PyTorch, for one batch size, height and width.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from msdd_fast.backends import use_backend
from msdd_fast.diffusion.checks import as_int, check_guidance, check_sampling
from msdd_fast.diffusion.config import Config
from msdd_fast.errors import BackendUnavailableError, InputError
from msdd_fast.families import family_of
from msdd_fast.families.base import require_unconditioned
from msdd_fast.io.files import as_path, atomic_write, require_writable
from msdd_fast.sampling import VelocityModel, sample
from msdd_fast.tokenizer import Tokenizer, as_tokenizer


class Exported(NamedTuple):
    """What was written.

    Attributes:
        inputs: name -> shape of each input; all are of the tokenizer's dtype but ``seeds``, int64.
        output: shape of the result.
        error: largest difference from the eager model, of the file that was loaded back; None if it was not run.
    """

    inputs: dict[str, tuple[int, ...]]
    output: tuple[int, ...]
    error: float | None


def export_decoder(
    tokenizer: Tokenizer | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    batch_size: int = 1,
    height: int | None = None,
    width: int | None = None,
    steps: int | None = None,
    cfg_scale: float | None = None,
    aot: bool = False,
) -> Exported:
    """Write a whole decode, (z, seeds) -> images, as a .pt2 file.

    ``torch.export.load(path).module()`` runs it, ``torch._inductor.aoti_load_package(path)`` with ``aot``.

    Args:
        tokenizer: or what ``Tokenizer.from_pretrained`` takes.
        path: ends in .pt2. Nothing is written unless the file loads again and gives the eager model's images.
        batch_size, height, width: fixed in the file; height and width default to ``config.image_size``.
        steps, cfg_scale: default to ``config.sampling``.
        aot: compile it with AOTInductor for the device of the tokenizer, which needs a C++ compiler on a CPU.

    Raises InputError for a bad argument and for a model that PyTorch cannot export.
    """
    tokenizer = as_tokenizer(tokenizer)
    target = _target(path, ".pt2")
    config, sampling = tokenizer.config, tokenizer.config.sampling
    require_unconditioned(family_of(config), "an exported decoder")
    steps, cfg_scale = check_sampling(
        sampling.steps if steps is None else steps, sampling.cfg_scale if cfg_scale is None else cfg_scale
    )
    check_guidance(config, cfg_scale)
    z = _latents(tokenizer, batch_size, height, width)
    seeds = torch.arange(len(z), device=z.device)
    decode = _Decode(tokenizer, steps, cfg_scale)
    with _plain():
        expected = _attempt("decoded by its eager model", lambda: decode(z, seeds))
        program = _attempt("exported", lambda: torch.export.export(decode, (z, seeds)))
        with atomic_write(target) as temporary:
            if aot:
                inductor = cast(Any, torch._inductor)
                _attempt(
                    "compiled by AOTInductor",
                    lambda: inductor.aoti_compile_and_package(program, package_path=str(temporary)),
                )
                loaded = inductor.aoti_load_package(str(temporary))
            else:
                torch.export.save(program, temporary)
                loaded = _attempt("loaded again", lambda: torch.export.load(temporary).module())
            error = _difference(_attempt("run again", lambda: loaded(z, seeds)), expected)
    return Exported({"z": tuple(z.shape), "seeds": tuple(seeds.shape)}, tuple(expected.shape), error)


def export_network(
    tokenizer: Tokenizer | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    stage: int = -1,
    batch_size: int = 1,
    height: int | None = None,
    width: int | None = None,
) -> Exported:
    """Write the velocity network of one scale, (x_t, t, z) -> velocity, as an .onnx file (extra ``[export]``).

    The sampler stays with the caller. ``stage`` counts from the coarsest scale, -1 is the finest; other arguments as of
    ``export_decoder``. The file is run by ONNX Runtime, if that is installed, and compared with the eager model.

    Raises InputError for a bad argument and for a model that cannot be exported, BackendUnavailableError without the
    packages onnx and onnxscript.
    """
    tokenizer = as_tokenizer(tokenizer)
    target = _target(path, ".onnx")
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise BackendUnavailableError(f"ONNX needs {' and '.join(missing)}: pip install 'msdd-fast[export]'")
    require_unconditioned(family_of(tokenizer.config), "an exported network")
    if tokenizer.dtype == torch.bfloat16:
        raise InputError("ONNX files are compared through NumPy, which has no bfloat16: use tokenizer.float()")
    z = _latents(tokenizer, batch_size, height, width)
    shapes = tokenizer.config.stage_shapes(z.shape)
    if not isinstance(stage, int) or not -len(shapes) <= stage < len(shapes):
        raise InputError(f"stage must be an integer in [{-len(shapes)}, {len(shapes) - 1}], got {stage!r}")
    x_t = torch.randn(len(z), *shapes[stage], generator=torch.Generator().manual_seed(1)).to(z)
    t = torch.linspace(0.4, 0.6, len(z)).to(z)
    inputs = {"x_t": x_t, "t": t, "z": z}
    network = _Network(tokenizer.decoder)
    with _plain():
        expected = _attempt("evaluated by its eager model", lambda: network(**inputs))
        with atomic_write(target) as temporary:
            _attempt(
                "exported to ONNX",
                lambda: torch.onnx.export(
                    network,
                    tuple(inputs.values()),
                    str(temporary),
                    input_names=list(inputs),
                    output_names=["velocity"],
                    dynamo=True,
                    external_data=False,
                    verbose=False,
                ),
            )
            error = _run_onnx(temporary, inputs, expected)
    return Exported({name: tuple(x.shape) for name, x in inputs.items()}, tuple(expected.shape), error)


class _Decode(nn.Module):
    def __init__(self, tokenizer: Tokenizer, steps: int, cfg_scale: float) -> None:
        super().__init__()
        self.decoder, self.schedule = tokenizer.decoder, tokenizer.schedule
        self.steps, self.cfg_scale = steps, cfg_scale

    def forward(self, z: Tensor, seeds: Tensor) -> Tensor:
        images = sample(
            cast(VelocityModel, self.decoder),
            z,
            self.schedule,
            steps=self.steps,
            cfg_scale=self.cfg_scale,
            seed=seeds,
        )
        return cast(Tensor, images)


class _Network(nn.Module):
    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, x_t: Tensor, t: Tensor, z: Tensor) -> Tensor:
        return cast(Tensor, self.decoder(x_t, t, z))


@contextlib.contextmanager
def _plain() -> Iterator[None]:
    """No op of ours in the graph, no gradients, no warnings of exporters about themselves."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with use_backend("eager"), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _target(path: str | os.PathLike[str], suffix: str) -> Path:
    target = as_path("path", path)
    if target.suffix != suffix:
        raise InputError(f"path must end in {suffix}, got {target}")
    require_writable(target)
    return target


def _latents(tokenizer: Tokenizer, batch_size: Any, height: Any, width: Any) -> Tensor:
    """Random latents of images of this size."""
    config, batch = tokenizer.config, as_int("batch_size", batch_size, 1)
    shape = (batch, *_latent_shape(config, height, width))
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return z.to(tokenizer.device, tokenizer.dtype)


def _latent_shape(config: Config, height: Any, width: Any) -> tuple[int, ...]:
    sizes = {
        name: config.image_size if size is None else as_int(name, size, 1)
        for name, size in (("height", height), ("width", width))
    }
    fixed = tuple(n for n in config.latent_shape if n is not None)
    if len(fixed) == len(config.latent_shape):
        for name, size in sizes.items():
            if size != config.image_size:
                raise InputError(f"{name} must be {config.image_size}, which this model has fixed, got {size}")
        return fixed
    cell = config.stage_shapes((1, *fixed, 1, 1))[-1][-1]
    for name, size in sizes.items():
        if size % cell:
            raise InputError(f"{name} must be a multiple of {cell}, the pixels of a latent cell, got {size}")
    return (*fixed, *(size // cell for size in sizes.values()))


def _attempt(what: str, run: Callable[[], Any]) -> Any:
    """Raises InputError with the first line of whatever PyTorch says."""
    try:
        return run()
    except Exception as e:  # exporters raise many types
        reason = next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)
        raise InputError(f"this model cannot be {what}: {reason}") from e


def _run_onnx(path: Path, inputs: dict[str, Tensor], expected: Tensor) -> float | None:
    try:
        import onnxruntime
    except ImportError:
        return None
    given = {name: x.cpu().numpy() for name, x in inputs.items()}

    def run() -> Any:
        return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, given)

    (found,) = _attempt("run by ONNX Runtime", run)
    return _difference(torch.from_numpy(found), expected)


def _difference(found: Tensor, expected: Tensor) -> float:
    """Raises InputError if the file gives something else than the eager model."""
    error = float((found.float().cpu() - expected.float().cpu()).abs().max())
    if not error <= 1e-2 * max(1.0, float(expected.abs().max())):
        raise InputError(f"the exported program differs from the eager model by {error:.1e}, so nothing was written")
    return error
