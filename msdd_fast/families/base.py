"""What the library has to know of a family of tokenizers, which each family's ``family.py`` answers."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from msdd_fast.diffusion.config import Config
from msdd_fast.diffusion.schedule import StageSchedule
from msdd_fast.errors import CheckpointError, InputError
from msdd_fast.families.work import Work
from msdd_fast.io.files import as_path
from msdd_fast.io.safetensors import check_weights, read_safetensors
from msdd_fast.io.torch_files import read_torch_file
from msdd_fast.layers.linear.base import MakeLinear
from msdd_fast.layers.request import DecodeProgram
from msdd_fast.ops import Ops
from msdd_fast.sampling import StageResult


class Released(NamedTuple):
    """A checkpoint of a family's authors, translated.

    Attributes:
        config: with every size that the tensors show.
        tensors: under our names and in our conventions. Whether none is missing, unexpected or misshapen is checked
            when they are loaded into a tokenizer.
        unused: the authors' names of tensors that nothing reads.
        source: what error messages call it.
    """

    config: Config
    tensors: dict[str, Tensor]
    unused: list[str]
    source: str


class Option(NamedTuple):
    """A keyword argument of ``ReleasedFormat.load`` that ``msdd-fast convert`` offers."""

    default: int | str
    help: str
    choices: tuple[str, ...] | None = None


class ReleasedFormat(NamedTuple):
    """The format in which a family's authors publish weights.

    Attributes:
        suffixes: of files that ``msdd-fast convert`` takes for this family's unless told otherwise.
        load: (path or state dict, **options) -> Released. Raises CheckpointError for foreign, damaged or contradictory
            files, InputError for a bad option. Nothing in a file is executed.
        options: keyword arguments of ``load`` that ``msdd-fast convert`` offers.
        export: a tokenizer's state dict -> the tensors as the authors' code loads them; None if there is no export.
    """

    suffixes: tuple[str, ...]
    load: Callable[..., Released]
    options: Mapping[str, Option]
    export: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None


class Conditions(NamedTuple):
    """What a decode depends on besides latents and seeds.

    Attributes:
        tensors: (B, ...) each.
        size: height and width of the images; None where the latents' shape says it (``config.stage_shapes``).
        noises: number of noise tensors of the images' shape that a decode takes; None for one per stage.
    """

    tensors: tuple[Tensor, ...] = ()
    size: tuple[int, int] | None = None
    noises: int | None = None


@runtime_checkable
class Conditioned(Protocol):
    """What a family has besides if its decodes read more than latents and seeds, such as captions."""

    condition_names: ClassVar[Mapping[str, str]]
    """Keyword arguments of ``decode`` that ``condition`` takes, and what each is."""

    def condition(self, z: Tensor, steps: int, cfg_scale: float, **given: Any) -> Conditions:
        """What a decode of ``z`` depends on, from those arguments. Raises InputError for bad ones."""
        ...

    def example_conditions(self) -> dict[str, Any]:
        """Arguments for a decode of random latents, for reports and warm-ups."""
        ...

    def sample(
        self,
        decoder: Any,
        z: Tensor,
        conditions: Conditions,
        *,
        steps: int,
        cfg_scale: float,
        seed: int | Sequence[int] | Tensor,
        noise: Sequence[Tensor] | None,
        stage_callback: Callable[[StageResult], None] | None,
    ) -> Tensor:
        """The eager decode, in place of ``sampling.sample``."""
        ...


class Family(Protocol):
    """A family, bound to one config by ``family_of(config)``. It keeps no model."""

    name: ClassVar[str]
    """As in ``config.family``."""
    config_type: ClassVar[type[Any]]
    """The dataclass of its configs: a ``diffusion.config.Config`` with ``from_dict``."""
    presets: ClassVar[Mapping[str, Config]]
    released: ClassVar[ReleasedFormat | None]
    no_fast_tier: ClassVar[str]
    """Why ``accelerate(tier="fast")`` is not offered; empty if it is."""

    @property
    def no_encoder(self) -> str:
        """Why images cannot be encoded, and where latents come from instead; empty if they can."""
        ...

    def __init__(self, config: Any) -> None: ...

    @property
    def example(self) -> tuple[int, ...]:
        """Shape of the latents of one image of ``config.image_size``."""
        ...

    @property
    def model(self) -> str:
        """The model in a line of the report."""
        ...

    @property
    def constant(self) -> tuple[str, ...]:
        """What the engine computes once and keeps, for the report."""
        ...

    def describe_sampling(self, steps: int, cfg_scale: float) -> str:
        """Steps and guidance in a line of the report."""
        ...

    def build(self) -> tuple[nn.Module, nn.Module]:
        """Encoder and decoder with random weights.

        The encoder maps images (B, 3, H, W) to latents, the decoder (x_t, t, z) to the velocity; it has a ``config``.
        """
        ...

    def check_images(self, images: Tensor) -> None:
        """Raise InputError for a shape that the encoder does not take."""
        ...

    def tables(self, decoder: Any, schedule: StageSchedule, steps: int, device: torch.device) -> Any:
        """Everything that depends on time alone, in whatever form ``program`` takes it."""
        ...

    def program(
        self,
        decoder: Any,
        schedule: StageSchedule,
        tables: Any,
        dtype: torch.dtype,
        device: torch.device,
        ops: Ops,
        make: MakeLinear,
    ) -> DecodeProgram:
        """The whole decode over packed copies of the decoder's weights; ``make`` packs those of its linears."""
        ...

    def quantizable(self, decoder: Any) -> list[tuple[str, Tensor]]:
        """Names and weights of the linears that the fast tier packs in 8 bits."""
        ...

    def tables_memory(self, tables: Any) -> int:
        """Bytes."""
        ...

    def decode_work(
        self, batch: int = 1, steps: int = 1, cfg_scale: float = 1.0, itemsize: int = 2, hoisted: bool = True
    ) -> list[Work]:
        """FLOP and bytes of one decode of ``batch`` images: as the engine runs it, or as the eager model does."""
        ...

    def encode_work(self, batch: int = 1, itemsize: int = 2) -> list[Work]:
        """FLOP and bytes of encoding ``batch`` images. Raises InputError if the family does not count them."""
        ...


def conditions_of(family: Family, z: Tensor, steps: int, cfg_scale: float, given: Mapping[str, Any]) -> Conditions:
    """What a decode of ``z`` depends on besides, from the keyword arguments ``given``.

    Raises InputError for an argument that the family does not take, and for a bad value.
    """
    known = family.condition_names if isinstance(family, Conditioned) else ()
    unknown = [name for name in given if name not in known]
    if unknown:
        takes = f", only {', '.join(known)}" if known else ""
        raise InputError(f"decode of an {family.name.upper()} tokenizer takes no argument {unknown[0]!r}{takes}")
    return family.condition(z, steps, cfg_scale, **given) if isinstance(family, Conditioned) else Conditions()


def require_unconditioned(family: Family, what: str) -> None:
    """Raise InputError if decodes of the family depend on more than latents and seeds, all that ``what`` passes on."""
    if isinstance(family, Conditioned):
        needs = ", ".join(family.condition_names)
        raise InputError(f"{what} passes on latents and seeds only; {family.name.upper()} also takes {needs}")


def example_conditions(family: Family) -> dict[str, Any]:
    """Keyword arguments for a decode of random latents; empty where latents are all that it takes."""
    return family.example_conditions() if isinstance(family, Conditioned) else {}


def read_released(source: str | os.PathLike[str] | Mapping[str, Any]) -> tuple[str, Any]:
    """(what messages call it, content) of a .safetensors or .pt file, or of a state dict, whose tensors are copied.

    Raises CheckpointError for a missing or damaged file, and for one that holds more than tensors and plain data.
    """
    if isinstance(source, Mapping):
        return "state dict", _copied(source)
    as_path("source", source)
    path = Path(source)
    return str(path), read_safetensors(path) if path.suffix == ".safetensors" else read_torch_file(path)


def strip_prefixes(state: Mapping[str, Any]) -> dict[str, Any]:
    """Names without the ``module.`` and ``_orig_mod.`` of parallel and compiled models.

    Raises CheckpointError if two become one, or if one of the values cannot be a weight.
    """
    plain: dict[str, Any] = {}
    for name, value in state.items():
        short = re.sub(r"^((module|_orig_mod)\.)+", "", name)
        if short in plain:
            raise CheckpointError(f"{short} is there twice, once as {name}")
        plain[short] = value
    check_weights(plain, "weights")
    return plain


def _copied(value: Any) -> Any:
    """The model must not share memory with the caller's tensors."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    return {name: _copied(item) for name, item in value.items()} if isinstance(value, Mapping) else value
