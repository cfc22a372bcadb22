"""FastDecoder: the eager tokenizer's decode at the speed of the hardware (docs/engine.md)."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from msdd_fast.backends.environment import thread_problems
from msdd_fast.diffusion.checks import (
    as_int,
    check_bool,
    check_finite,
    check_guidance,
    check_latents,
    check_noise,
    check_sampling,
    first_not_finite,
)
from msdd_fast.diffusion.config import Config
from msdd_fast.diffusion.noise import resolve_seeds
from msdd_fast.engine.batching import split_evenly
from msdd_fast.engine.bound_ops import bind
from msdd_fast.engine.compute import compute_dtype
from msdd_fast.engine.graph_cache import GraphCache, use_graphs
from msdd_fast.engine.isolation import building, without_autocast
from msdd_fast.engine.memory import CPU_SLACK, Budget, Plan, is_out_of_memory
from msdd_fast.engine.prefetch import prefetch
from msdd_fast.engine.report import Accuracy, Report, describe
from msdd_fast.engine.tier import (
    EXACT,
    Tier,
    calibration_latents,
    check_limit,
    fast_tier,
    measure,
    plain_images,
    require,
)
from msdd_fast.errors import InputError
from msdd_fast.families import family_of
from msdd_fast.families.base import Conditioned, Conditions, Family, conditions_of, example_conditions
from msdd_fast.layers.request import (
    WHOLE,
    AnySize,
    DecodeProgram,
    Inputs,
    Request,
    StageImages,
    Way,
    convert,
    stream,
    ways_of,
)
from msdd_fast.tokenizer import Tokenizer, as_tokenizer

OUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)
TIERS = ("exact", "fast")
GPU_BATCH_SIZES = (1, 8, 64)
# A CPU is busy from a few images on; larger batches only leave its caches.
CPU_BATCH_SIZES = (8,)
NO_CONDITIONS = Conditions()
MAX_PLANNED = 256  # sizes whose plans are kept


def accelerate(
    tokenizer: Tokenizer | str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.bfloat16,
    tier: str = "exact",
    backend: str = "auto",
    steps: int | None = None,
    cfg_scale: float | None = None,
    batch_sizes: int | Sequence[int] | None = None,
    graphs: str | bool = "auto",
    max_memory: int | None = None,
    max_psnr_loss: float = 0.1,
    calibration: Tensor | None = None,
    validate: bool = False,
    batch_invariant: bool = False,
) -> FastDecoder:
    """An engine for the decoder of ``tokenizer``, which is not changed. It has its own weights.

    Autocast, inference mode, and PyTorch's default dtype and device have no influence, here and at every call.

    Args:
        tokenizer: or what ``Tokenizer.from_pretrained`` takes.
        dtype: float32, bfloat16 or float16 of weights and activations; statistics, softmax and noise are float32. A CPU
            without bfloat16 instructions calculates in float32 instead (``report`` says so).
        tier: "exact", the eager model's arithmetic up to rounding, or "fast", matrix products in 8 bits: float8 on a
            GPU of sm_89 or newer (dtype bfloat16), int8 on a CPU; not for SSDD, whose products are convolutions.
        backend: of the ops: "auto", a name, or names per op ("auto,attention=sdpa").
        steps, cfg_scale: default to ``config.sampling``.
        batch_sizes: on a GPU, recorded as CUDA graphs, from which any other size is put together; on a CPU, and
            without graphs, the largest is the most that runs at once. One number or several. Default (1, 8, 64) on a
            GPU, (8,) on a CPU: give more where there are more than four threads, so that each has two images to decode.
        graphs: "auto" (CUDA graphs on a GPU, recorded programs on a CPU where every op of the decode is native; if
            recording fails, without, and ``report`` says why), True (a failure is an error) or False.
        max_memory: bytes for the weights, tables, activations and images of a decode, as ``memory_for`` predicts them,
            on a CPU with room for what the C library's heap keeps. What does not fit runs with fewer images at once;
            images of any size (SSDD, PiD) then in parts, the same up to rounding, and at last in overlapping tiles,
            which changes them (docs/memory.md). If memory runs out all the same, the next smaller way is taken. While
            a fast engine is checked, the weights of the exact one exist, too, which is not counted.
        max_psnr_loss: of tier "fast": refuse if it is expected to cost more than this many dB of a reconstruction of
            25 dB (engine/tier.py has the formula). Measured against the exact tier; ``report`` has the figures.
        calibration: latents (B, num_latent_tokens, latent_dim) to measure that on. Default: four photographs of
            scikit-image, encoded, or random latents if it is not installed.
        validate: check every z, and the images of it, for NaN and Inf, which waits for the device.
        batch_invariant: the same latents and seed give the same image bit for bit in every batch: images run one at a
            time, through kernels of one shape. ``batch_sizes`` is then 1.

    Raises InputError for a bad argument, BackendUnavailableError for graphs, a backend or a tier that cannot be had,
    AccuracyError for a fast tier that would lose too much.
    """
    tokenizer = as_tokenizer(tokenizer)
    _one_of("tier", tier, TIERS)
    check_limit(max_psnr_loss)
    check_bool("validate", validate)
    check_bool("batch_invariant", batch_invariant)
    options = Options(dtype, backend, steps, cfg_scale, batch_sizes, graphs, max_memory, validate, batch_invariant)
    if tier == "exact":
        if calibration is not None:
            raise InputError("calibration is for tier='fast', got it with tier='exact'")
        return FastDecoder(tokenizer, EXACT, options)
    device = tokenizer.device
    with building(device):
        fast = fast_tier(tokenizer, device, compute_dtype(dtype, device)[0], bind(backend))
        z, source = calibration_latents(tokenizer, calibration)
        # The exact engine is gone before the fast one is made: never both sets of weights.
        plain = replace(options, batch_sizes=None, graphs=False, max_memory=None)
        exact = plain_images(FastDecoder(tokenizer, EXACT, plain), z)
        engine = FastDecoder(tokenizer, fast, options)
        engine.accuracy = measure(plain_images(engine, z), exact, source)
    require(engine.accuracy, max_psnr_loss)
    return engine


@dataclass(frozen=True)
class Options:
    """What ``accelerate`` was asked for, but for the tier; see there."""

    dtype: torch.dtype
    backend: str
    steps: int | None
    cfg_scale: float | None
    batch_sizes: int | Sequence[int] | None
    graphs: str | bool
    max_memory: int | None
    validate: bool
    batch_invariant: bool


class FastDecoder:
    """Latents to images with everything hoisted, packed, fused and recorded. Made by ``accelerate``.

    Calls from several threads are safe; those that replay a graph run one after the other.

    Attributes:
        config, family: of the model.
        steps, cfg_scale: per scale, and of the guidance.
        device, dtype, dtype_reason: where it runs, in which arithmetic, and why in that one.
        tier, tier_description, accuracy: "exact" or "fast", what that means here, and what "fast" was measured to lose.
        batch_sizes: recorded, or the most images that run at once.
        max_memory, memory: the bound, and the bytes of each part.
        validate: whether every z and every image is checked for NaN and Inf.
        batch_invariant: whether images run one at a time, so that their bits do not depend on the batch.
        notes: what ``report`` says besides.
        tokenizer, program: the model, which is not kept alive, and the program of its network.
    """

    config: Config
    family: Family
    steps: int
    cfg_scale: float
    device: torch.device
    dtype: torch.dtype
    dtype_reason: str
    tier: str
    tier_description: str
    accuracy: Accuracy | None
    batch_sizes: tuple[int, ...]
    max_memory: int | None
    memory: dict[str, int]
    validate: bool
    batch_invariant: bool
    notes: list[str]
    tokenizer: weakref.ref[Tokenizer]
    program: DecodeProgram

    def __init__(self, tokenizer: Tokenizer, tier: Tier, options: Options) -> None:
        self.config, self.validate = tokenizer.config, options.validate
        self.family = family_of(self.config)
        self._is_conditioned = isinstance(self.family, Conditioned)
        sampling = self.config.sampling
        self.tokenizer = weakref.ref(tokenizer)  # for the report; the engine keeps no second copy of the model alive
        self.steps, self.cfg_scale = check_sampling(
            sampling.steps if options.steps is None else options.steps,
            sampling.cfg_scale if options.cfg_scale is None else options.cfg_scale,
        )
        check_guidance(self.config, self.cfg_scale)
        self.tier, self.tier_description = tier.name, tier.description
        self.accuracy = None
        self.device = tokenizer.device
        self.dtype, self.dtype_reason = compute_dtype(options.dtype, self.device)
        if not isinstance(options.graphs, (str, bool)):
            raise InputError(f"graphs must be 'auto', True or False, got {type(options.graphs).__name__}")
        use_graphs(options.graphs, self.device)  # for its errors, before the work
        self.batch_invariant = options.batch_invariant
        sizes = _check_sizes(options.batch_sizes, self.device)
        if self.batch_invariant:
            if options.batch_sizes is not None and sizes != (1,):
                raise InputError(f"batch_sizes must be None or 1 with batch_invariant=True, got {options.batch_sizes}")
            sizes = (1,)
        self.max_memory = None if options.max_memory is None else as_int("max_memory", options.max_memory, 1)
        decoder, schedule = tokenizer.decoder, tokenizer.schedule
        ops = bind(options.backend)
        with building(self.device):
            tables = self.family.tables(decoder, schedule, self.steps, self.device)
            self.program = self.family.program(decoder, schedule, tables, self.dtype, self.device, ops, tier.make)
        self.memory = {"weights": self.program.network.w.memory(), "tables": self.family.tables_memory(tables)}
        fixed = sum(self.memory.values())
        slack = CPU_SLACK if self.device.type == "cpu" else 1.0
        self._budget = Budget(self.program, self.config, fixed, self.max_memory, max(sizes), slack)
        self._planned: dict[tuple[Request, int], list[Plan]] = {}
        self._failed: set[tuple[Request, Way, int]] = set()
        self.notes = []
        self.batch_sizes = self._fitting(sizes)
        self._budget.most = max(self.batch_sizes)
        if self.batch_invariant:
            self.notes.append("images run one at a time (batch_invariant=True)")
        if self.device.type == "cpu":
            self.notes += thread_problems()
        most, stages = max(self.batch_sizes), self.config.schedule.num_stages
        self._cache = GraphCache(self.program, self.device, options.graphs, self.batch_sizes, self._example, stages)
        self._planned.clear()
        self._budget.granule, self._budget.graphed_at_once = self._cache.granule, self._cache.images_at_once
        example = self._example_request(most)
        example = example._replace(way=self.plan(example).way)
        self.memory[f"activations of batch {most} (bound)"] = self._budget.held(self.program.activations(example))

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"FastDecoder({self.family.model}, {dtype} on {self.device}, tier={self.tier!r}, steps={self.steps}, "
            f"cfg_scale={self.cfg_scale:g}, batch_sizes={self.batch_sizes}, graphs={self.graphs})"
        )

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse pickle, copy and deepcopy: packed weights, graphs and locks belong to one process."""
        raise InputError(
            "a FastDecoder can be neither pickled nor copied: send the Tokenizer, and call accelerate on it there"
        )

    @property
    def graphs(self) -> bool:
        """Whether decodes are replayed: from CUDA graphs on a GPU, from recorded programs on a CPU."""
        return self._cache.enabled

    @property
    def graphs_reason(self) -> str:
        """Why there are graphs, or none."""
        return self._cache.reason

    def warmup(self) -> None:
        """Run, and record, every batch size once; with CUDA graphs, measure what each costs, to split other sizes by.

        SSDD: at ``config.image_size``; graphs for other heights and widths are captured when they first occur.
        """
        for size in self.batch_sizes:
            z = torch.zeros(size, *self.family.example, device=self.device)
            self.decode(z, **example_conditions(self.family))
            if self._cache.splits:
                self._cache.set_cost(size, sorted(self._seconds(z) for _ in range(5))[2])

    def decode(
        self,
        z: Tensor,
        seed: int | Sequence[int] | Tensor = 0,
        *,
        noise: Sequence[Tensor] | None = None,
        cfg_scale: float | None = None,
        out_dtype: torch.dtype = torch.float32,
        out: Tensor | None = None,
        copy: bool = True,
        steps: int | None = None,
        tile: int | None = None,
        **conditions: Any,
    ) -> Tensor:
        """Images of latents.

        Args:
            z: (B, num_latent_tokens, latent_dim), or for SSDD (B, latent_channels, h, w); float32, bfloat16,
                float16 or float64, on any device.
                Pinned memory is read while the GPU works: synchronise before you refill it.
            seed: an int (image i uses seed + i) or one int per image, in [0, 2^63). Ignored with ``noise``.
            noise: as in ``sampling.sample``; runs without graphs.
            cfg_scale: instead of the engine's; SSDD has 1 only.
            out_dtype: float32, bfloat16 or float16 (nominally in [-1, 1], not clamped), or uint8 (0 to 255).
            out: contiguous (B, 3, H, W) of ``out_dtype`` on the engine's device, which receives the images.
            copy: False allows to return a graph's own memory, which the next call overwrites.
            steps: None, or those that the engine was made for: what depends on them was computed then.
            tile: decode larger images in overlapping tiles of this many pixels a side, which changes them a little
                (docs/memory.md); None leaves that to ``max_memory``. SSDD and PiD only.
            conditions: what else the family's decodes depend on, as in ``Tokenizer.decode``.

        Returns (B, 3, H, W). Raises InputError for anything else, and if ``validate`` is set for NaN or Inf in z or in
        the images.
        """
        self._check_steps(steps)
        with without_autocast(self.device):
            others = self.conditions(z, cfg_scale, **conditions)
            inputs = self.inputs(z, seed, cfg_scale, others)
            request = self.request(z, cfg_scale, out_dtype, conditions=others)
            side = self._check_tile(tile)
            if noise is not None:
                check_noise(noise, len(z), self._noise_shapes(request, others))
            if not self.validate:
                return self._decode(inputs, request, noise, out, copy, side)
            _check_out(out, (len(z), *request.image_shape(self.config)), out_dtype, self.device)
            wide = request._replace(out_dtype=torch.float32) if out_dtype == torch.uint8 else request
            images = self._decode(inputs, wide, noise, None, copy or out_dtype == torch.uint8, side)
            _check_images(images)
            images = convert(images, out_dtype)
            return images if out is None else out.copy_(images)

    __call__ = decode

    @torch.no_grad()
    def _decode(
        self,
        inputs: Inputs,
        request: Request,
        noise: Sequence[Tensor] | None,
        out: Tensor | None,
        copy: bool,
        tile: int,
    ) -> Tensor:
        """Images in the first way for which there is memory."""
        _check_out(out, (len(inputs.z), *request.image_shape(self.config)), request.out_dtype, self.device)
        if noise is not None:
            noise = [n.detach().to(self.device) for n in noise]
        plans = self._plans(request, tile)
        for plan in plans[:-1]:
            try:
                return self._decode_as(plan, inputs, request, noise, out, copy)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            # Here the error is gone, and with it the frames that hold what was computed.
            self._give_up(plan, request, tile, reason)
        return self._decode_as(plans[-1], inputs, request, noise, out, copy)

    def _decode_as(
        self,
        plan: Plan,
        inputs: Inputs,
        request: Request,
        noise: Sequence[Tensor] | None,
        out: Tensor | None,
        copy: bool,
    ) -> Tensor:
        """Images in chunks that run at once."""
        batch, request = len(inputs.z), request._replace(way=plan.way)
        shape = (batch, *request.image_shape(self.config))
        usual = plan.way == WHOLE and plan.images >= max(self.batch_sizes)
        graphed = self.graphs and noise is None and usual
        chunks = self._cache.chunks(batch, graphed) if usual else split_evenly(batch, plan.images)
        if len(chunks) == 1 and out is None and not (copy and graphed):
            return self._decode_chunk(inputs, request.with_batch(chunks[0].size), noise, None, graphed)
        if out is None:
            out = torch.empty(shape, dtype=request.out_dtype, device=self.device)
        begin = 0
        for chunk in chunks:
            part = slice(begin, begin + chunk.images)
            mine = noise and [n[part] for n in noise]
            self._decode_chunk(inputs.part(part), request.with_batch(chunk.size), mine, out[part], graphed)
            begin += chunk.images
        return out

    def _decode_chunk(
        self, inputs: Inputs, request: Request, noise: Sequence[Tensor] | None, out: Tensor | None, graphed: bool
    ) -> Tensor:
        """Images of one chunk, written to ``out`` if it is given."""
        graph = None
        if graphed:
            with building(self.device):  # what is captured is used by calls in every mode
                graph = self._cache.get(request)
        if graph is not None:
            return graph.replay(inputs, out)
        images = self.program.decode(inputs, request, noise)
        return images if out is None else out.copy_(images)

    def stream(
        self,
        z: Tensor,
        seed: int | Sequence[int] | Tensor = 0,
        *,
        cfg_scale: float | None = None,
        out_dtype: torch.dtype = torch.float32,
        steps: int | None = None,
        **conditions: Any,
    ) -> Iterator[StageImages]:
        """The same decode stage by stage: yields each stage's clean estimate as soon as it is done.

        Arguments as of ``decode``. The whole batch runs at once: InputError if ``max_memory`` does not allow it in any
        way. One graph per stage, on a GPU for the batch sizes of the engine; other sizes, and a second stream at the
        same time, run without graphs.
        """
        self._check_steps(steps)
        with without_autocast(self.device):
            others = self.conditions(z, cfg_scale, **conditions)
            inputs = self.inputs(z, seed, cfg_scale, others)
        request = self.request(z, cfg_scale, out_dtype, streaming=True, conditions=others)
        plans = self._plans(request)
        if self.max_memory is not None:
            most = max(plan.images for plan in plans)
            if len(z) > most:
                limit = f"to stream in max_memory={self.max_memory}"
                raise InputError(f"z must hold at most {most} images {limit}, got {len(z)}")
            plans = [plan for plan in plans if plan.images >= len(z)]
        request = request._replace(way=plans[0].way)
        if not len(z):
            return iter(self._no_images(request))
        return self._stream_each(inputs, request) if self.batch_invariant else self._stream(inputs, request)

    def _stream_each(self, inputs: Inputs, request: Request) -> Iterator[StageImages]:
        """Stage by stage, each image by itself and without graphs, which only one stream at a time could have."""
        parts = [inputs.part(slice(i, i + 1)) for i in range(len(inputs.z))]
        for pieces in zip(*(self._stream(part, request.with_batch(1)) for part in parts), strict=True):
            images, states = torch.cat([p.images for p in pieces]), torch.cat([p.state for p in pieces])
            yield StageImages(pieces[0].stage, images, states)

    def _stream(self, inputs: Inputs, request: Request) -> Iterator[StageImages]:
        graphs = None
        usual = len(inputs.z) in self.batch_sizes or not self._cache.splits
        if self.graphs and usual and not self.batch_invariant and request.way == WHOLE:
            with building(self.device):
                graphs = self._cache.get_stages(request)
        claimed = graphs is not None and graphs.claim()
        pieces = graphs.replay(inputs) if graphs is not None and claimed else stream(self.program, inputs, request)
        while True:
            # Not held across a yield: it would leak into the caller's code.
            with torch.no_grad(), without_autocast(self.device):
                piece = next(pieces, None)
            if piece is None:
                return
            if self.validate:
                _check_images(piece.state)
            yield piece

    def decode_many(
        self,
        latents: Iterable[Tensor],
        seed: int = 0,
        *,
        cfg_scale: float | None = None,
        out_dtype: torch.dtype = torch.float32,
        steps: int | None = None,
        **conditions: Any,
    ) -> Iterator[Tensor]:
        """Images of each tensor of latents, shaped as in ``decode``, in order.

        The next tensors are fetched, pinned and copied to the device while this one decodes. Image i of the whole
        stream has seed + i, however it is cut into tensors. A tensor must not be changed before its images have come:
        ``latents`` yields a new one each time. Errors of ``latents`` come through unchanged, where their
        tensor would have come.
        """
        self._check_steps(steps)
        if not isinstance(latents, Iterable) and not hasattr(latents, "__getitem__"):
            raise InputError(f"latents must be an iterable of tensors, got {type(latents).__name__}")
        options = {"cfg_scale": cfg_scale, "out_dtype": out_dtype, **conditions}
        return self._decode_many(latents, as_int("seed", seed, 0), options)

    def _decode_many(self, latents: Iterable[Tensor], seed: int, options: dict[str, Any]) -> Iterator[Tensor]:
        with closing(prefetch(latents, self.device)) as tensors:
            for z in tensors:
                yield self.decode(z, seed, **options)
                seed += len(z)

    def report(self, z: Tensor | None = None) -> Report:
        """What was made constant, which backend each op takes and why, memory, and the difference from eager.

        Decodes ``z`` (default: one random latent image) with the eager tokenizer too, in its own dtype.
        """
        with without_autocast(self.device):
            return describe(self, z)

    def memory_for(self, height: int, width: int, batch: int = 1) -> int:
        """Bytes that a decode of ``batch`` images of this size is predicted to hold at once.

        These are weights, tables, activations and float32 images, in the way that ``max_memory`` allows; without it,
        whole images, as many at once as the largest batch has. Counted are the tensors of a decode with fused ops,
        which on a CPU need the extension: not what libraries take inside, what the allocator keeps, or the graphs of
        other sizes. Conditions are those of the family's example.

        Raises InputError for a size that the model does not decode, and if no way fits into ``max_memory``.
        """
        sides = (as_int("height", height, 1), as_int("width", width, 1))
        batch, shape = as_int("batch", batch, 1), self._latents_of(sides)
        return self.plan(self._request_of(batch, shape)).bytes

    def plan(self, request: Request, tile: int | None = None) -> Plan:
        """How ``decode(tile=tile)`` does a request: in which way, how many images at once, in how many bytes."""
        return self._plans(request, self._check_tile(tile), wants_bytes=True)[0]

    def release(self) -> None:
        """Free the memory of all graphs and recorded programs. Later decodes record again.

        Ways that were given up because memory ran out are tried again, too.
        """
        self._failed.clear()
        self._planned.clear()
        self._cache.release()

    def graph_memory(self) -> dict[str, int]:
        """Bytes that the graphs of ``decode`` hold; empty before the first capture."""
        return self._cache.memory()

    # --- For those who run the program themselves: reports, tiers, benchmarks. ---

    def conditions(self, z: Tensor, cfg_scale: float | None = None, **given: Any) -> Conditions:
        """What a decode of ``z`` depends on besides latents and seeds, checked, from the arguments of ``decode``."""
        if not given and not self._is_conditioned:
            return NO_CONDITIONS
        check_latents(z, *self.config.latent_shape)
        _, scale = check_sampling(self.steps, self.cfg_scale if cfg_scale is None else cfg_scale)
        return conditions_of(self.family, z, self.steps, scale, given)

    def inputs(
        self,
        z: Tensor,
        seed: int | Sequence[int] | Tensor = 0,
        cfg_scale: float | None = None,
        conditions: Conditions = NO_CONDITIONS,
    ) -> Inputs:
        """What the program takes for arguments of ``decode``, checked and on the device."""
        if torch._C._get_tracing_state() is not None:
            raise InputError("a FastDecoder cannot be recorded by torch.jit.trace: trace the tokenizer's decoder")
        check_latents(z, *self.config.latent_shape)
        _, scale = check_sampling(self.steps, self.cfg_scale if cfg_scale is None else cfg_scale)
        check_guidance(self.config, scale)
        if self.validate:
            check_finite("z", z)
        to_gpu = self.device.type == "cuda"  # a copy to a CPU must have arrived before it is read
        return Inputs(
            z.detach().to(self.device, self.dtype, non_blocking=to_gpu),
            resolve_seeds(seed, len(z)).to(self.device, non_blocking=to_gpu),
            torch.tensor(scale, dtype=torch.float32, device="cpu").to(self.device, non_blocking=to_gpu),
            tuple(t.to(self.device, non_blocking=to_gpu) for t in conditions.tensors),
        )

    def request(
        self,
        z: Tensor,
        cfg_scale: float | None = None,
        out_dtype: torch.dtype = torch.float32,
        *,
        streaming: bool = False,
        conditions: Conditions = NO_CONDITIONS,
    ) -> Request:
        """What arguments of ``decode``, or of ``stream``, ask of the program. Raises InputError for the dtype."""
        _one_of("out_dtype", out_dtype, OUT_DTYPES)
        guided = check_sampling(self.steps, self.cfg_scale if cfg_scale is None else cfg_scale)[1] != 1.0
        kinds = tuple((tuple(t.shape[1:]), t.dtype) for t in conditions.tensors)
        return Request(tuple(z.shape), guided, out_dtype, streaming, conditions.size, kinds)

    # --- Private. ---

    def _example(self, request: Request) -> Inputs:
        inputs = self.inputs(torch.zeros(request.shape, device=self.device, dtype=self.dtype))
        batch = request.shape[0]
        zeros = (torch.zeros(batch, *shape, dtype=dtype, device=self.device) for shape, dtype in request.conditions)
        return inputs._replace(conditions=tuple(zeros))

    def _noise_shapes(self, request: Request, conditions: Conditions) -> list[tuple[int, int, int]]:
        """Shapes of the noise tensors of a decode."""
        if conditions.noises is None:
            return self.config.stage_shapes(request.shape)
        return [request.image_shape(self.config)] * conditions.noises

    def _check_steps(self, steps: int | None) -> None:
        if steps is not None and as_int("steps", steps, 1) != self.steps:
            raise InputError(
                f"steps must be {self.steps}, for which this engine was made (its time tables are computed once): use "
                f"accelerate(tokenizer, steps={steps})"
            )

    def _plans(self, request: Request, tile: int = 0, wants_bytes: bool = False) -> list[Plan]:
        """What ``max_memory`` allows, from the fastest; without it, the request whole, or in tiles of that side.

        Raises InputError with the figures if nothing fits.
        """
        if self.max_memory is None and not wants_bytes:
            return [Plan(Way(tile=tile) if self._is_larger(request, tile) else WHOLE, max(self.batch_sizes), 0, 0)]
        found = self._planned.get((request, tile))
        if found is None:
            ways = ways_of(self.program, request)
            if self._is_larger(request, tile):
                ways = [Way(tile=tile), *(way for way in ways if 0 < way.tile < tile)]
            if len(self._planned) >= MAX_PLANNED:
                self._planned.clear()
            found = self._planned[request, tile] = self._budget.plans(request, ways)
        kind = request.with_batch(1)
        return [plan for plan in found[:-1] if (kind, plan.way, plan.images) not in self._failed] + found[-1:]

    def _is_larger(self, request: Request, tile: int) -> bool:
        return bool(tile) and max(request.image_shape(self.config)[1:]) > tile

    def _give_up(self, plan: Plan, request: Request, tile: int, reason: str) -> None:
        """Note that memory ran out, and make room."""
        self._failed.add((request.with_batch(1), plan.way, plan.images))
        height, width = request.image_shape(self.config)[1:]
        following = self._plans(request, tile)[0]
        self.notes.append(
            f"{height} x {width} px, {plan.way}, {plan.images} at once, ran out of memory ({reason}): from now on "
            f"{following.way}, {following.images} at once"
        )
        self._cache.release()

    def _fitting(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """The batch sizes that fit whole at ``config.image_size``; if none does, the most images that do, or 1."""
        if self.max_memory is None:
            return sizes
        plans = self._plans(self._example_request(max(sizes)))
        most = max((plan.images for plan in plans if plan.way == WHOLE), default=0)
        fitting = tuple(s for s in sizes if s <= most)
        dropped = [s for s in sizes if s > most]
        if dropped:
            self.notes.append(f"batch sizes {', '.join(map(str, dropped))} do not fit in max_memory={self.max_memory}")
        return fitting or (max(1, most),)

    def _example_request(self, batch: int) -> Request:
        """For images of ``config.image_size``."""
        return self._request_of(batch, self.family.example)

    def _request_of(self, batch: int, shape: tuple[int, ...]) -> Request:
        """For latents of a shape, with the family's example of other conditions."""
        z = torch.zeros((), dtype=self.dtype).expand(batch, *shape)
        others = self.conditions(z, self.config.sampling.cfg_scale, **example_conditions(self.family))
        return self.request(z, conditions=others)

    def _latents_of(self, sides: tuple[int, int]) -> tuple[int, ...]:
        """Shape of the latents of an image of these sides. Raises InputError if there are none."""
        shape = self.config.latent_shape
        if None not in shape:
            side = self.config.image_size
            if sides != (side, side):
                raise InputError(f"height and width must be {side}, as of all images of this model, got {sides}")
            return self.family.example
        unit = self.config.stage_shapes((1, self.family.example[0], 1, 1))[-1][1:]
        for name, side, pixels in zip(("height", "width"), sides, unit, strict=True):
            if side % pixels:
                raise InputError(f"{name} must be a multiple of {pixels}, got {side}")
        return self.family.example[0], sides[0] // unit[0], sides[1] // unit[1]

    def _check_tile(self, tile: int | None) -> int:
        if tile is None:
            return 0
        side = as_int("tile", tile, 1)
        if not isinstance(self.program, AnySize):
            raise InputError(f"tile must be None for {self.family.name.upper()}, whose images have one size: {side}")
        least = self.program.min_tile
        if side < least or side % least:
            raise InputError(f"tile must be a multiple of {least}, got {side}")
        return side

    def _no_images(self, request: Request) -> Iterator[StageImages]:
        """What ``stream`` yields for no latents: no images of every stage."""
        for s, shape in enumerate(self.config.stage_shapes(request.shape)):
            images = torch.empty(0, *shape, dtype=request.out_dtype, device=self.device)
            yield StageImages(s, images, torch.empty(0, *shape, dtype=torch.float32, device=self.device))

    def _seconds(self, z: Tensor) -> float:
        torch.cuda.synchronize(self.device)
        begin = time.perf_counter()
        self.decode(z, copy=False, **example_conditions(self.family))
        torch.cuda.synchronize(self.device)
        return time.perf_counter() - begin


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    if not any(type(value) is type(a) and value == a for a in allowed):  # a tensor has no single answer to ==
        raise InputError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")
    return value


def _check_sizes(sizes: int | Sequence[int] | None, device: torch.device) -> tuple[int, ...]:
    if sizes is None:
        return GPU_BATCH_SIZES if device.type == "cuda" else CPU_BATCH_SIZES
    try:
        given = tuple(sizes) if isinstance(sizes, Iterable) and not isinstance(sizes, bytes) else (sizes,)
        numbers = sorted({as_int("batch_sizes", s, 1) for s in given})
    except (InputError, TypeError):  # TypeError: an array without dimensions
        numbers = []
    if not numbers:
        raise InputError(f"batch_sizes must be integers >= 1, got {sizes!r}")
    return tuple(numbers)


def _check_images(images: Tensor) -> None:
    first = first_not_finite(images)
    if first is not None:
        raise InputError(f"z must decode to finite images, got NaN or Inf in those of item {first}")


def _check_out(out: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if out is None:
        return
    if not isinstance(out, Tensor) or out.shape != shape or out.dtype != dtype or out.device != device:
        got = f"{out.dtype} {tuple(out.shape)} on {out.device}" if isinstance(out, Tensor) else type(out).__name__
        raise InputError(f"out must be {dtype} {shape} on {device}, got {got}")
    if not out.is_contiguous():
        raise InputError(f"out must be contiguous, got strides {out.stride()}")
