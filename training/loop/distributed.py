"""Several processes started by torchrun: NCCL between GPUs, gloo between CPUs. All of it works in one process, too."""

from __future__ import annotations

import datetime
import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from msdd_fast.errors import ConfigError, MsddFastError

T = TypeVar("T")


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def is_rank0() -> bool:
    """Whether this process writes the files that exist once."""
    return rank() == 0


@contextmanager
def process_group(device: str, timeout_minutes: float = 30.0) -> Iterator[str]:
    """Join torchrun's process group, if there is one; yields the device of this process.

    ``device`` "cuda" becomes "cuda:LOCAL_RANK". Raises ConfigError if the device does not work here, a process has no
    GPU of its own, or torchrun's environment is incomplete.
    """
    size = os.environ.get("WORLD_SIZE")
    if size is None or is_distributed():
        _check_device(device)
        yield device
        return
    missing = [n for n in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ]
    if missing:
        raise ConfigError(f"WORLD_SIZE={size} is set but not {', '.join(missing)}: start several processes by torchrun")
    gpu = device.startswith("cuda")
    backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(minutes=timeout_minutes))
    try:
        if not gpu:
            on_all_ranks(lambda: _check_device(device))
        yield on_all_ranks(_own_gpu) if gpu else device
        barrier()  # do not leave while another process still reads from this one
    finally:
        dist.destroy_process_group()
        # What is still in a reference cycle joins its threads now: at exit they would abort the process.
        gc.collect()


def _check_device(name: str) -> None:
    try:
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError, ImportError) as e:  # unknown, absent, or one that holds no data
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise ConfigError(f"loop.device must name a torch device that works here, got {name!r}: {reason}") from e


def _own_gpu() -> str:
    local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= gpus:
        wanted = os.environ.get("LOCAL_WORLD_SIZE", str(local + 1))
        raise ConfigError(f"{wanted} processes on one machine need as many GPUs, got {gpus}")
    torch.cuda.set_device(local)
    return f"cuda:{local}"


def try_on_all_ranks(build: Callable[[], T]) -> tuple[T | None, MsddFastError | None]:
    """Run ``build`` on every rank: (its result, None), or (None, error) on all ranks if it failed on any.

    The error is that of the lowest rank that has one. ``build`` must not communicate with other ranks.
    """
    result: T | None = None
    mine: MsddFastError | None = None
    try:
        result = build()
    except MsddFastError as e:
        mine = e
    if world_size() == 1:
        return result, mine
    errors: list[Any] = [None] * world_size()
    dist.all_gather_object(errors, None if mine is None else (type(mine), str(mine)))
    for process, error in enumerate(errors):
        if error is not None:
            kind, text = error
            return None, kind(text if process == 0 else f"{text} (process {process} of {world_size()})")
    return result, None


def gather(value: T) -> list[T]:
    """The value of every process, in the order of the ranks, in every process."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_all_ranks(build: Callable[[], T]) -> T:
    """The result of ``build`` on every rank. If it fails on any, all stop; see ``try_on_all_ranks``."""
    result, error = try_on_all_ranks(build)
    if error is not None:
        raise_on_rank0(error)
    return cast(T, result)


def on_rank0_and_broadcast(build: Callable[[], T]) -> T:
    """Run ``build`` on rank 0 and send its result, or its error, to all ranks."""
    if world_size() == 1:
        return build()
    box: list[Any] = [None]
    if is_rank0():
        try:
            box = [(build(), None)]
        except MsddFastError as e:
            box = [(None, (type(e), str(e)))]
    dist.broadcast_object_list(box)
    result, error = box[0]
    if error is not None:
        raise_on_rank0(error[0](error[1]))
    return cast(T, result)


def raise_on_rank0(error: MsddFastError) -> NoReturn:
    """Stop all ranks with an error that all have: rank 0 raises it, the others exit, so that it is printed once."""
    if not is_rank0():
        with suppress(RuntimeError):
            dist.all_reduce(torch.zeros(()))  # ends when rank 0 has gone
        raise SystemExit(1)
    raise error


def sum_over_processes(x: Tensor) -> Tensor:
    """Sum ``x`` over the processes, in place; every process gets the same bits."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def mean_over_processes(x: Tensor) -> Tensor:
    """Average ``x`` over the processes, in place."""
    return sum_over_processes(x).div_(world_size()) if world_size() > 1 else x


def broadcast(tensors: Sequence[Tensor], source: int) -> list[Tensor]:
    """The tensors of process ``source``, in all processes, in one message; the others give any of the same shapes."""
    if not tensors:
        return []
    flat = torch.cat([t.flatten() for t in tensors])
    dist.broadcast(flat, source)
    return [part.view_as(t) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]


def barrier() -> None:
    """Wait for all processes."""
    sum_over_processes(torch.zeros(()))


def batch_share(batch_size: int, micro_batch: int | None) -> tuple[int, int]:
    """(images per micro-batch of a process, micro-batches per step).

    Raises ConfigError unless ``batch_size`` divides evenly among the processes and their micro-batches.
    """
    size = world_size()
    if batch_size % size:
        raise ConfigError(f"batch_size must be a multiple of the number of processes, {size}, got {batch_size}")
    share = batch_size // size
    micro = share if micro_batch is None else min(micro_batch, share)
    if micro < 1 or share % micro:
        raise ConfigError(
            f"micro_batch must divide the {share} images of a process (batch_size {batch_size} on {size} "
            f"process{'es' if size > 1 else ''}), got {micro_batch}"
        )
    return micro, share // micro
