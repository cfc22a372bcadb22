"""Our decoders and those of other projects in one run: 256x256 images per second, parameters and FLOP.

    python -m msdd_fast.bench.baselines.peers [--batch-size 1] [--dtype fp32] [--only NAME ...] [--json FILE]

diffusers builds the other decoders (``pip install 'msdd-fast[peers]'``) at their published configurations with random
weights, since speed does not depend on weights. All decoders share dtype, batch and timer. The ways to run one decoder
take turns, and each makes at least one call after its first. The decoders run one after the other, since together they
would not fit into a small memory. torch counts the FLOP of one decoded image.

Two kinds of entries are marked: the teacher of 30 steps is one step measured and multiplied, and torch.compile, which
runs in a process of its own, is stopped if its first call takes longer than ``--compile-seconds``.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msdd_fast.bench.baselines import ours
from msdd_fast.bench.baselines.autoencoders import AUTOENCODERS
from msdd_fast.bench.baselines.consistency import CONSISTENCY
from msdd_fast.bench.baselines.ours import OURS
from msdd_fast.bench.baselines.peer import Peer, build, import_diffusers, size_of
from msdd_fast.bench.baselines.rae import RAE
from msdd_fast.bench.baselines.turns import WAYS, Options, in_turns
from msdd_fast.bench.report.documents import read_json, taken_for
from msdd_fast.bench.report.text import aligned, number
from msdd_fast.bench.timing.ceilings import copy_bandwidth, gemm_rate
from msdd_fast.bench.timing.machine import machine_info
from msdd_fast.errors import InputError
from msdd_fast.io.arguments import DTYPES, dtype_name, pick_device, positive_int, renamed
from msdd_fast.io.files import require_writable
from msdd_fast.io.json_files import write_json
from msdd_fast.io.program import run_program

PEERS = (*AUTOENCODERS, RAE, CONSISTENCY)


def measure(
    options: Options, only: Sequence[str] = (), progress: Callable[[str], None] = lambda _: None
) -> list[dict[str, Any]]:
    """One row per decoder: name, parameters, flops, and for each way to run it the result of ``in_turns``."""
    rows: list[dict[str, Any]] = []
    for peer in PEERS:
        if not only or peer.name in only:
            progress(peer.name)
            rows.append(_measure_peer(peer, options))
            gc.collect()
    for name in OURS:
        if not only or name in only:
            progress(name)
            rows += ours.measure(name, options)
            gc.collect()
    return rows


@torch.no_grad()
def _measure_peer(peer: Peer, options: Options) -> dict[str, Any]:
    model, z = build(peer, options.device, options.dtype, options.batch)
    ways = {"eager": lambda: peer.decode(model, z)}
    return {"name": peer.name, **size_of(peer), **in_turns(peer.name, ways, options)}


def compiled(name: str, device: str, dtype: str, batch: int) -> Callable[[Callable[[], None]], Tensor]:
    """The decoder ``name`` under torch.compile: what the isolated process runs (timing/isolated.py)."""
    where, kind = torch.device(device), getattr(torch, dtype)
    if name in OURS:
        call = ours.compiled(name, where, kind, batch)
        return lambda _: call()
    peer = next(p for p in PEERS if p.name == name)
    model, z = build(peer, where, kind, batch)
    for module in peer.decoder(model):
        module.compile(dynamic=False)  # in place: decode calls the submodule

    def run(_: Callable[[], None]) -> Tensor:
        with torch.no_grad():
            return peer.decode(model, z)

    return run


def table(rows: Sequence[dict[str, Any]], batch: int) -> list[str]:
    """img/s of every way to run each decoder; a mark after a number refers to a note below."""
    lines = [["decoder", "M", "GFLOP", *(f"{way} img/s" for way in WAYS)]]
    notes: list[str] = []
    for r in rows:
        cells = []
        for way in WAYS:
            timed = r.get(way, {})
            note = timed.get("missing") or timed.get("note")
            if note and note not in notes:
                notes.append(note)
            speed = number(batch / timed["median_s"]) if "median_s" in timed else "-"
            cells.append(speed + (f" [{notes.index(note) + 1}]" if note else ""))
        lines.append([r["name"], f"{r['parameters'] / 1e6:.1f}", f"{r['flops'] / 1e9:.0f}", *cells])
    return [*aligned(lines), *(f"[{i}] {note}" for i, note in enumerate(notes, 1))]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=positive_int, default=1)
    parser.add_argument("--dtype", type=dtype_name, choices=DTYPES, help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--device", help="torch device (default: cuda if there is one, else cpu)")
    parser.add_argument("--rounds", type=positive_int, default=20)
    parser.add_argument("--seconds", type=float, default=10.0, help="per decoder and way (default: %(default)s)")
    parser.add_argument("--compile-seconds", type=float, default=60.0, help="0 leaves it out (default: %(default)s)")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--from", dest="source", type=Path, metavar="FILE", help="measure nothing: print a stored table"
    )
    args = parser.parse_args(renamed(sys.argv[1:] if arguments is None else arguments, {"--batch": "--batch-size"}))
    if args.source:
        what = "a JSON file of peers"
        document = read_json(args.source, what)
        with taken_for(args.source, what):
            print("\n".join(table(document["rows"], document["batch"])))
        return
    if args.json:
        require_writable(args.json)
    known = [p.name for p in PEERS] + list(OURS)
    if set(args.only) - set(known):
        raise InputError(f"--only must name some of {', '.join(known)}, got {', '.join(args.only)}")
    if {p.name for p in PEERS} & set(args.only or known):
        import_diffusers()
    device = pick_device(args.device)
    dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    options = Options(device, getattr(torch, dtype), args.batch_size, args.rounds, args.seconds, args.compile_seconds)
    rows = measure(options, args.only, lambda name: print(f"measuring {name}", file=sys.stderr, flush=True))
    print("\n".join(table(rows, args.batch_size)))
    if args.json:
        ceilings = {"copy": copy_bandwidth(options.device), dtype: gemm_rate(options.device, options.dtype)}
        document = {
            "batch": args.batch_size,
            "dtype": dtype,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "machine": machine_info(),
            "ceilings": ceilings,
            "rows": rows,
        }
        write_json(args.json, document, indent=1)


if __name__ == "__main__":
    sys.exit(run_program(main))
