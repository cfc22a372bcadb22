"""What an engine is made of, as text for people and as data for programs."""

from __future__ import annotations

import collections
import weakref
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from msdd_fast.diffusion.config import Config
from msdd_fast.engine.memory import Plan
from msdd_fast.families.base import Conditions, Family, example_conditions
from msdd_fast.layers.request import DecodeProgram, Inputs, Request
from msdd_fast.metrics.image import psnr
from msdd_fast.ops._registry import Op, observe
from msdd_fast.tokenizer import Tokenizer


@dataclass(frozen=True)
class OpChoice:
    """Backend that an op took, how often in one decode, and why the backends before it were declined."""

    op: str
    backend: str
    calls: int
    declined: tuple[str, ...]


@dataclass(frozen=True)
class Accuracy:
    """Difference of two decodes of the same latents and seeds; of a tier also the PSNR that it is expected to lose."""

    against: str
    max_abs: float
    psnr: float
    expected_loss: float | None = None

    def __str__(self) -> str:
        loss = "" if self.expected_loss is None else f", expected loss of PSNR {self.expected_loss:.3f} dB"
        return f"max difference {self.max_abs:.1e}, PSNR {self.psnr:.1f} dB{loss}"


@dataclass(frozen=True)
class Report:
    """Answer of ``FastDecoder.report``; ``str`` of it is a table."""

    model: str
    device: str
    dtype: str
    tier: str
    sampling: str
    graphs: str
    batch_sizes: tuple[int, ...]
    products: tuple[str, ...]
    memory: dict[str, int]
    way: str
    constant: tuple[str, ...]
    accuracy: tuple[Accuracy, ...]
    notes: tuple[str, ...]
    ops: tuple[OpChoice, ...]

    def __str__(self) -> str:
        rows = [
            ("model", self.model),
            ("device", self.device),
            ("dtype", self.dtype),
            ("tier", self.tier),
            ("sampling", self.sampling),
            ("graphs", self.graphs),
            ("batch sizes", ", ".join(map(str, self.batch_sizes))),
            *(("products", line) for line in self.products),
            *(("memory", f"{size / 2**20:.1f} MiB {name}") for name, size in self.memory.items()),
            ("way", self.way),
            *(("constant", line) for line in self.constant),
            *((f"vs {a.against}", str(a)) for a in self.accuracy),
            *(("note", line) for line in self.notes),
        ]
        return "\n".join([f"{name:>14}  {text}" for name, text in rows] + ["", format_choices(self.ops)])


def format_choices(choices: tuple[OpChoice, ...]) -> str:
    """One line per op and backend: calls in one decode, and why each preferred backend was declined."""
    lines = [f"{'op':>28}  {'backend':<10}  {'calls':>5}  declined"]
    lines += [f"{c.op:>28}  {c.backend:<10}  {c.calls:>5}  {'; '.join(c.declined)}".rstrip() for c in choices]
    return "\n".join(lines)


class Engine(Protocol):
    """What reports and tiers need of an engine (``engine.decoder.FastDecoder``)."""

    config: Config
    family: Family
    tokenizer: weakref.ref[Tokenizer]
    program: DecodeProgram
    device: torch.device
    dtype: torch.dtype
    dtype_reason: str
    tier: str
    tier_description: str
    steps: int
    cfg_scale: float
    batch_sizes: tuple[int, ...]
    memory: dict[str, int]
    notes: list[str]
    accuracy: Accuracy | None

    @property
    def graphs(self) -> bool: ...

    @property
    def graphs_reason(self) -> str: ...

    def graph_memory(self) -> dict[str, int]: ...

    def conditions(self, z: Tensor, **given: Any) -> Conditions: ...

    def inputs(self, z: Tensor, seed: int = 0, *, conditions: Conditions = ...) -> Inputs: ...

    def request(self, z: Tensor, *, conditions: Conditions = ...) -> Request: ...

    def plan(self, request: Request) -> Plan: ...

    def decode(self, z: Tensor, **conditions: Any) -> Tensor: ...


class ChoiceRecorder:
    """Observes ops (``ops.observe``): counts the backends they take, and keeps why preferred ones were declined."""

    def __init__(self) -> None:
        self._calls: collections.Counter[tuple[str, str]] = collections.Counter()
        self._declined: dict[tuple[str, str], dict[str, str]] = {}

    def __call__(self, op: Op, backend: str, args: tuple[Any, ...]) -> None:
        key = (op.name, backend)
        self._calls[key] += 1
        reasons = self._declined.setdefault(key, {})
        for name, implementation in op.implementations.items():
            if name == backend:
                break
            ok, reason = implementation.can_use(*args)
            if not ok:
                reasons.setdefault(name, reason)

    def result(self) -> tuple[OpChoice, ...]:
        return tuple(
            OpChoice(op, backend, count, tuple(f"{b}: {r}" for b, r in self._declined[op, backend].items()))
            for (op, backend), count in self._calls.items()
        )


@torch.no_grad()
def describe(engine: Engine, z: Tensor | None) -> Report:
    """Report of ``engine``; runs one decode without graphs to see the ops, and one of the eager tokenizer.

    A replayed graph shows no ops: with graphs, and unless z is one image, the engine decodes once more to be compared.
    """
    if z is None:
        z = random_latents(engine.family, 1)
    z = z.to(engine.device)
    choices = ChoiceRecorder()
    given = example_conditions(engine.family)
    others = engine.conditions(z[:1], **given)
    request = engine.request(z[:1], conditions=others)
    plan = engine.plan(request)
    images = None
    with observe(choices):
        if engine.graphs or len(z) != 1:
            engine.program.decode(engine.inputs(z[:1], conditions=others), request._replace(way=plan.way))
        else:
            images = engine.decode(z, **given)
    tokenizer = engine.tokenizer()
    return Report(
        model=engine.family.model,
        device=torch.cuda.get_device_name(engine.device)
        if engine.device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads",
        dtype=f"{_name(engine.dtype)} ({engine.dtype_reason})",
        tier=f"{engine.tier}: {engine.tier_description}",
        sampling=engine.family.describe_sampling(engine.steps, engine.cfg_scale),
        graphs=f"{'yes' if engine.graphs else 'no'}: {engine.graphs_reason}",
        batch_sizes=engine.batch_sizes,
        products=products(engine.program.network.w),
        memory={**engine.memory, **engine.graph_memory()},
        way=f"{plan} for an image of {' x '.join(map(str, request.image_shape(engine.config)[1:]))} px",
        constant=engine.family.constant,
        accuracy=(
            *((_accuracy(engine, tokenizer, z, images),) if tokenizer is not None else ()),
            *((engine.accuracy,) if engine.accuracy is not None else ()),
        ),
        notes=tuple(engine.notes),
        ops=choices.result(),
    )


def products(weights: Any) -> tuple[str, ...]:
    """Who multiplies with which number of an engine's weights, and why."""
    count: collections.Counter[str] = collections.Counter()

    def walk(x: Any) -> None:
        description = getattr(x, "description", None)
        if isinstance(description, str):
            count[description] += 1
        elif isinstance(x, (list, tuple)):
            for part in x:
                walk(part)
        elif is_dataclass(x):
            for field in fields(x):
                walk(getattr(x, field.name))

    walk(weights)
    return tuple(f"{n} {text}" for text, n in count.most_common())


def random_latents(family: Family, batch: int) -> Tensor:
    """(batch, ...), the same at every call; float32 on the CPU whatever PyTorch's defaults are."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, *family.example, generator=generator, dtype=torch.float32, device="cpu")


def _accuracy(engine: Engine, tokenizer: Tokenizer, z: Tensor, images: Tensor | None) -> Accuracy:
    """Of ``images``, or if there are none of what the engine decodes now."""
    parameter = next(tokenizer.parameters())
    given = example_conditions(engine.family)
    mine = engine.decode(z, **given) if images is None else images
    reference = tokenizer.decode(z.to(parameter.dtype), 0, engine.steps, engine.cfg_scale, **given)
    error = float((mine - reference).abs().max())
    return Accuracy(f"eager {_name(parameter.dtype)}", error, float(psnr(mine, reference).min()))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
