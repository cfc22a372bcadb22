"""The arguments of every command that runs on Ray."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import NamedTuple

from msdd_fast.errors import InputError
from msdd_fast.io.arguments import positive_int

LOCAL = "local"


class RayOptions(NamedTuple):
    """Where and how wide.

    Attributes:
        address: of a cluster, or "local".
        workers: None for as many as the cluster has room for.
        cpus: cores of one worker, unless it has a GPU.
        device: None for GPUs if the cluster has some, else CPUs.
        quiet: no progress.
    """

    address: str
    workers: int | None
    cpus: int
    device: str | None
    quiet: bool = False


def add_ray(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("on Ray (needs the extra [ray]; docs/bulk.md)")
    group.add_argument(
        "--ray",
        nargs="?",
        const=LOCAL,
        metavar="ADDRESS",
        help="run on Ray: on this machine, or on the cluster at ADDRESS (auto, HOST:PORT, ray://HOST:PORT)",
    )
    group.add_argument("--workers", type=positive_int, help="engines (default: one per GPU, else as many as fit)")
    group.add_argument(
        "--cpus-per-worker", type=positive_int, help="cores of an engine without a GPU (default: 4, or all there are)"
    )


def absolute_checkpoint(name: str) -> str:
    """A directory by its absolute path, since workers have other working directories; other names as they are."""
    return str(Path(name).absolute()) if Path(name).is_dir() else name


def ray_options(args: argparse.Namespace) -> RayOptions | None:
    """None if --ray was not given. Raises InputError for options that need it, and if Ray is not installed."""
    if args.ray is None:
        given = [name for name in ("workers", "cpus_per_worker", "shards") if getattr(args, name, None)]
        if given:
            raise InputError(f"--{given[0].replace('_', '-')} needs --ray")
        return None
    if Path(args.ray).exists():
        raise InputError(f"--ray takes an address, got the path {args.ray}: put --ray behind the other arguments")
    if not has_ray():
        raise InputError("--ray needs Ray Data: pip install 'msdd-fast[ray]'")
    quiet = getattr(args, "quiet", False)
    return RayOptions(args.ray, args.workers, args.cpus_per_worker or 0, args.device, quiet)


def has_ray() -> bool:
    """Whether Ray Data is installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("ray", "pyarrow"))
