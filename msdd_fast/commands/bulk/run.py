"""Units of work through Ray Data, with a manifest of what is done."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from msdd_fast.commands.bulk.options import LOCAL, RayOptions
from msdd_fast.commands.bulk.workers import Unit, Worker
from msdd_fast.errors import BackendUnavailableError, InputError
from msdd_fast.io.json_files import append_json_lines, keep_json_lines, read_json_lines

MANIFEST = "manifest.jsonl"
CPUS_PER_WORKER = 4
MAX_BLOCKS = 10_000


def run_units(
    worker: Callable[..., Worker],
    arguments: dict[str, Any],
    units: Sequence[Unit],
    folder: Path,
    options: RayOptions,
) -> Iterator[tuple[dict[str, Any], bool]]:
    """Does the units that the folder's manifest does not have yet, or whose file is gone.

    Yields the manifest's lines, and whether this run has added them; those of earlier runs come first. A line is
    written when its unit is. Raises InputError with the first error of a unit, BackendUnavailableError if Ray fails.
    """
    manifest = folder / MANIFEST
    there = {_key(unit, folder) for unit in units if is_there(unit)}
    # What a kill cut off is dropped as well.
    keep_json_lines(manifest, lambda line: _key_of(line) in there)
    done = {_key_of(line): line for line in read_json_lines(manifest)}
    todo: list[dict[str, Any]] = []
    for number, unit in enumerate(units):
        line = done.get(_key(unit, folder))
        if line is not None:
            yield line, False
        else:
            todo.append({"unit": number, "work": json.dumps(unit)})
    if not todo:
        return
    total, missing = sum(u.images for u in units), sum(units[t["unit"]].images for t in todo)
    off = True if options.quiet else None  # None: tqdm looks whether stderr is a terminal
    with tqdm(total=total, initial=total - missing, unit="img", disable=off) as bar:
        for line in _on_ray(worker, arguments, todo, options):
            if "error" in line:
                raise InputError(line["error"])
            line["output"] = os.path.relpath(line["output"], folder)
            append_json_lines(manifest, [line])
            bar.update(line["count"])
            yield line, True
    sweep(units)


def adopt(folder: Path, units: Sequence[Unit], facts: Callable[[Unit], dict[str, Any] | None]) -> None:
    """Enter units that were done without Ray into the folder's manifest; ``facts`` gives None for one that was not."""
    keep_json_lines(folder / MANIFEST, lambda line: True)  # what a kill cut off would swallow the first new line
    known = {_key_of(line) for line in read_json_lines(folder / MANIFEST)}
    lines = []
    for unit in units:
        key = _key(unit, folder)
        found = None if key in known else facts(unit)
        if found is not None:
            lines.append({**dict(zip(("first", "count", "output"), key, strict=True)), **found})
    if lines:
        append_json_lines(folder / MANIFEST, lines)


def sweep(units: Sequence[Unit]) -> None:
    """Remove what workers were writing when they were killed; now that all units are done, nobody is writing."""
    folders = set()
    for unit in units:
        output = Path(unit.output)
        folders |= {output.parent} if output.is_file() else {(output / name).parent for name in unit.names}
    for folder in folders:
        for path in folder.iterdir():
            if re.fullmatch(r"\.[0-9a-f]{32}\.(tar|safetensors|png)", path.name):
                path.unlink(missing_ok=True)


def _key(unit: Unit, folder: Path) -> tuple[int, int, str]:
    """How a manifest in ``folder`` names a unit."""
    return unit.first, unit.images, os.path.relpath(unit.output, folder)


def _key_of(line: dict[str, Any]) -> tuple[Any, Any, Any]:
    return line.get("first"), line.get("count"), line.get("output")


def is_there(unit: Unit) -> bool:
    """Whether the results of a unit that a manifest lists still exist."""
    output = Path(unit.output)
    return output.is_file() or (output.is_dir() and all((output / f"{name}.png").is_file() for name in unit.names))


def _on_ray(
    worker: Callable[..., Worker], arguments: dict[str, Any], todo: list[dict[str, Any]], options: RayOptions
) -> Iterator[dict[str, Any]]:
    # Ray's C++ part warns of every actor that may restart; what is fatal is still said.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray

    _require_reachable(options.address)
    local = {"include_dashboard": False} if options.address == LOCAL else {}
    try:
        with _own_handler():
            ray.init(address=options.address, log_to_driver=False, logging_level=logging.ERROR, **local)
    except (ConnectionError, RuntimeError, ValueError) as e:
        raise BackendUnavailableError(f"--ray {options.address}: {_reason(e)}") from e
    try:
        count, resources = _workers(options, ray.cluster_resources())
        threads = None if "num_gpus" in resources else int(resources["num_cpus"])
        device = options.device or ("cuda" if "num_gpus" in resources else "cpu")
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        rows = ray.data.from_items(todo, override_num_blocks=min(len(todo), MAX_BLOCKS))
        for handler in logging.getLogger("ray.data").handlers:
            if not isinstance(handler, logging.FileHandler):
                handler.setLevel(logging.ERROR)
        results = rows.map_batches(
            worker,
            fn_constructor_kwargs={**arguments, "device": device, "threads": threads},
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(count, len(todo)), max_tasks_in_flight_per_actor=2),
            **resources,
        )
        for row in results.iter_rows():
            yield json.loads(row["result"])
    except ray.exceptions.RayError as e:
        raise BackendUnavailableError(f"Ray gave up: {_reason(e)}") from e
    finally:
        ray.shutdown()


@contextmanager
def _own_handler() -> Iterator[None]:
    """Ray's, which it leaves in place of ours, ends the process with another exit code and no word."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        with suppress(ValueError):  # not in the main thread, where Ray sets none
            signal.signal(signal.SIGTERM, handler)


def _require_reachable(address: str) -> None:
    """Fail at once where Ray would try for minutes. Raises BackendUnavailableError if nobody listens at HOST:PORT."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as e:
        raise BackendUnavailableError(f"--ray {address}: {e.strerror or e}") from e


def _workers(options: RayOptions, cluster: dict[str, float]) -> tuple[int, dict[str, Any]]:
    """How many workers, and what Ray reserves for each. Raises InputError if the cluster has too little for them."""
    gpus, cpus = int(cluster.get("GPU", 0)), int(cluster.get("CPU", 0))
    if gpus and (options.device or "cuda").startswith("cuda"):
        return options.workers or gpus, {"num_gpus": 1, "num_cpus": 1}
    each = options.cpus or min(CPUS_PER_WORKER, cpus)
    count = options.workers or max(1, cpus // each)
    # A cluster may grow; this machine does not, and Ray would wait for ever.
    if each > cpus or (options.address == LOCAL and count * each > cpus):
        raise InputError(
            f"--workers {count} of --cpus-per-worker {each} need {count * each} cores, Ray has {cpus} "
            f"({'this machine' if options.address == LOCAL else options.address})"
        )
    return count, {"num_cpus": each}


def _reason(error: BaseException) -> str:
    """One line of what may be pages: the first that names an exception which is not one of Ray's."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"(?!ray\.)[\w.]*(Error|Exception): ", line)]
    return (named or lines[-1:] or [type(error).__name__])[0][:300]


def split_units(count: int, size: int) -> list[tuple[int, int]]:
    """First image and number of images of every unit."""
    return [(first, min(size, count - first)) for first in range(0, count, size)]
