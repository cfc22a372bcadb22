"""The graphs of one engine: captured when first asked for, and what each batch size costs.

On a GPU these are CUDA graphs, on a CPU recorded programs (engine/programs.py). A program takes about one decode to
record, so it is made for every batch size that occurs. From ``IMAGES_PER_THREAD`` on each thread decodes images of its
own, and one program for each thread serves all batch sizes. Programs keep the number of threads that they were recorded
for. The least recently used of both kinds are dropped.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from msdd_fast.backends.choice import is_automatic
from msdd_fast.engine import graphs
from msdd_fast.engine.batching import Chunk, assumed_cost, split_by_cost, split_evenly
from msdd_fast.engine.memory import is_out_of_memory
from msdd_fast.engine.programs import ParallelDecode, ProgramRecorder, can_record
from msdd_fast.errors import BackendUnavailableError, InputError
from msdd_fast.layers.request import DecodeProgram, Inputs, NotRecordable, Request, stream
from msdd_fast.native.program import CHUNK

IMAGES_PER_THREAD = 2
"""From which each thread decodes images of its own, one at a time. With one image each, two threads took 1.1 times as
long for two images of msdd-nano as both together."""
ANY_BATCH = -1
MAX_GRAPHS = 32  # of each kind: a few batch sizes of some dtypes, and the sizes of images where there are several
Decode = graphs.Graph | ParallelDecode
G = TypeVar("G", Decode, graphs.StageGraphs)


class GraphCache:
    """Graphs by request.

    Attributes:
        enabled: whether there are graphs. Turns False for good if a capture fails, unless graphs are required.
        reason: why.
        sizes: batch sizes that are captured on a GPU; on a CPU, and without graphs, the largest is the most that runs
            at once.

    Args:
        program: one that is ``NotRecordable`` is never recorded on a CPU, for its reason.
        wanted: "auto" (where it can; without graphs if a capture fails), True (a failure is an error) or False.
        example: makes inputs of a request to capture with.
        stages: number of stages of a decode.
    """

    enabled: bool
    reason: str
    sizes: tuple[int, ...]

    def __init__(
        self,
        program: DecodeProgram,
        device: torch.device,
        wanted: str | bool,
        sizes: Sequence[int],
        example: Callable[[Request], Inputs],
        stages: int,
    ) -> None:
        self.enabled, self.reason = use_graphs(wanted, device)
        refusal = program.not_recordable if records_programs(device) and isinstance(program, NotRecordable) else ""
        if self.enabled and refusal:
            if wanted is True:
                raise BackendUnavailableError(f"graphs=True cannot be had: {refusal}")
            self.enabled, self.reason = False, refusal
        self.sizes, self._required = tuple(sizes), wanted is True
        self._program, self._device, self._example, self._stages = program, device, example, stages
        self._cost = assumed_cost(self.sizes)
        self._capturing, self._replaying = threading.Lock(), threading.Lock()
        self._exact = records_programs(device)  # one graph for each batch size that occurs, without padding
        self._recorder: graphs.Recorder | ProgramRecorder | None = None
        self._thread_recorders: list[ProgramRecorder] = []
        self._graphs: dict[Request, Decode] = {}  # a ParallelDecode by the request for ANY_BATCH
        self._stage_graphs: dict[Request, graphs.StageGraphs] = {}

    @property
    def splits(self) -> bool:
        """Whether a batch is put together from graphs of ``sizes``: with CUDA graphs, not with programs."""
        return self.enabled and not self._exact

    def chunks(self, batch: int, graphed: bool) -> list[Chunk]:
        """How to run ``batch`` images; ``graphed`` with batches of the captured sizes."""
        if graphed and self.splits:
            return split_by_cost(batch, self._cost)
        return split_evenly(batch, max(self.sizes))

    def set_cost(self, size: int, seconds: float) -> None:
        """What a batch of ``size`` was measured to take."""
        self._cost[size] = seconds

    def get(self, request: Request) -> Decode | None:
        """The graph of a whole decode, captured if there is none yet; None without graphs."""
        return self._get(self._key(request), self._graphs, self._capture)

    def get_stages(self, request: Request) -> graphs.StageGraphs | None:
        """The same for a streaming request, one graph per stage."""
        return self._get(request, self._stage_graphs, self._capture_stages)

    @property
    def granule(self) -> int:
        """Bytes in whose multiples graphs keep memory; 0 without graphs."""
        return (CHUNK if self._exact else 1) if self.enabled else 0

    def release(self) -> None:
        """Drop all graphs, and the memory that they share."""
        with self._capturing, self._replaying:
            self._drop_all()

    def memory(self) -> dict[str, int]:
        """Bytes that the graphs of whole decodes hold; empty before the first capture."""
        recorders = [r for r in (self._recorder, *self._thread_recorders) if r is not None]
        return {"graphs": sum(r.memory() for r in recorders)} if recorders else {}

    def _get(self, request: Request, known: dict[Request, G], capture: Callable[[Request], G]) -> G | None:
        if self._exact and not is_automatic():  # a program has the backends that it was recorded with
            return None
        with self._capturing:
            if request in known:
                known[request] = known.pop(request)  # the most recently used is the last
            if request in known or not self.enabled:
                return known.get(request)
            try:
                with torch.no_grad():
                    known[request] = self._with_room(lambda: capture(request))
            except (MemoryError, RuntimeError) as error:
                if is_out_of_memory(error):
                    raise
                what = "an image for each thread" if request.shape[0] == ANY_BATCH else f"batch {request.shape[0]}"
                reason = f"the capture of {what} failed: {error}"
                if self._required:
                    raise BackendUnavailableError(f"graphs=True, but {reason}") from error
                self.enabled, self.reason = False, reason
                self._forget()
            if len(known) > MAX_GRAPHS:
                self._wait()
                del known[next(iter(known))]
            return known.get(request)

    def _with_room(self, capture: Callable[[], G]) -> G:
        """``capture()``; where memory is short, once more without the graphs that there are.

        What a capture that failed had recorded is dropped.
        """
        try:
            return capture()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            others = bool(self._graphs or self._stage_graphs)
            self._drop_all()
            if not others:
                raise
        try:
            return capture()
        except (MemoryError, RuntimeError):
            self._drop_all()
            raise

    def _forget(self) -> None:
        """Keep neither graphs nor the memory that they share, unless somebody else does."""
        self._graphs.clear()
        self._stage_graphs.clear()
        self._recorder = None
        self._thread_recorders.clear()

    def _drop_all(self) -> None:
        self._wait()
        self._forget()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _wait(self) -> None:
        """A graph must not be dropped while the device replays it."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def images_at_once(self, batch: int) -> int:
        """How many images of a batch its graph works on at the same time: fewer than all are each in their own."""
        threads = torch.get_num_threads()
        return threads if self._exact and batch >= IMAGES_PER_THREAD * threads else batch

    def _key(self, request: Request) -> Request:
        batch = request.shape[0]
        return request if self.images_at_once(batch) == batch else request.with_batch(ANY_BATCH)

    def _capture(self, request: Request) -> Decode:
        if request.shape[0] == ANY_BATCH:
            return self._capture_parallel(request.with_batch(1), torch.get_num_threads())
        self._recorder = self._recorder or self._new_recorder()
        if isinstance(self._recorder, ProgramRecorder):
            self._recorder.reserve(self._program.activations(request))
        with self._replaying:  # the graphs' pool is in use while one is captured
            return graphs.Graph(
                self._recorder,
                self._replaying,
                self._example(request),
                lambda inputs: self._program.decode(inputs, request),
            )

    def _capture_parallel(self, request: Request, threads: int) -> ParallelDecode:
        """For a request of one image."""
        chunk = CHUNK // threads  # together they waste no more than one arena
        while len(self._thread_recorders) < threads:
            self._thread_recorders.append(ProgramRecorder(chunk))
        recorders = self._thread_recorders[:threads]
        for recorder in recorders:
            recorder.reserve(self._program.activations(request))
        with self._replaying:
            return ParallelDecode(
                recorders, self._replaying, self._example(request), lambda inputs: self._program.decode(inputs, request)
            )

    def _new_recorder(self) -> graphs.Recorder | ProgramRecorder:
        return ProgramRecorder() if self._exact else graphs.Recorder(self._device)

    def _capture_stages(self, request: Request) -> graphs.StageGraphs:
        recorder, example, program = self._new_recorder(), self._example(request), self._program
        if not self._exact:  # a CUDA graph has the images within
            return graphs.StageGraphs(
                recorder,
                example,
                lambda inputs: stream(program, inputs, request),
                lambda stage, end, inputs: end,
                self._stages,
            )
        return graphs.StageGraphs(
            recorder,
            example,
            lambda inputs: program.stages(inputs, request),
            lambda stage, end, inputs: program.images(stage, end, inputs, request),
            self._stages,
        )


def records_programs(device: torch.device) -> bool:
    """Whether graphs on this device are recorded programs."""
    return device.type == "cpu"


def use_graphs(wanted: str | bool, device: torch.device) -> tuple[bool, str]:
    """Whether an engine has graphs, and why. Raises InputError, or BackendUnavailableError if they are required."""
    if wanted not in ("auto", True, False):
        raise InputError(f"graphs must be 'auto', True or False, got {wanted!r}")
    if device.type == "cuda":
        return bool(wanted), "one per batch size" if wanted else "not wanted (graphs=False)"
    can, reason = can_record() if device.type == "cpu" else (False, f"needs a CUDA device or a CPU, got {device}")
    if wanted is True and not can:
        raise BackendUnavailableError(f"graphs=True cannot be had: {reason}")
    return (can and bool(wanted)), reason if wanted else "not wanted (graphs=False)"
