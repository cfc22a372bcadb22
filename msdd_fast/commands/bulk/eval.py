"""``msdd-fast eval --ray``: the parts of ``eval`` by many workers; images may lie in WebDataset shards, too."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from msdd_fast.commands.bulk.options import LOCAL, RayOptions, absolute_checkpoint
from msdd_fast.commands.bulk.run import MANIFEST, adopt, run_units
from msdd_fast.commands.bulk.sources import Ref, list_images
from msdd_fast.commands.bulk.workers import Unit, Worker
from msdd_fast.commands.common import DTYPES, pick_device
from msdd_fast.commands.evaluation.job import Inputs, Job, list_inputs, machine, make_job
from msdd_fast.commands.evaluation.run import ON_RAY, PartFolder, Result, collect, measure_part, write_part
from msdd_fast.commands.evaluation.suite import parse_features
from msdd_fast.commands.output import say
from msdd_fast.engine.compute import compute_dtype
from msdd_fast.integrations.ray import stages

# What a job is made of, besides paths, the device and what the driver alone reads.
OPTIONS = (
    *("crop", "resize", "pixels", "ssim", "decoder", "dtype", "steps", "cfg_scale", "seed", "batch_size"),
    *("name", "reconstructions"),
)
WEIGHTS = ("vgg19", "lpips_vgg", "lpips_alex")


class EvalWorker(Worker):
    """Images to one part of an evaluation, as ``msdd-fast eval`` writes its parts."""

    def __init__(self, options: dict[str, Any], device: str | None, threads: int | None) -> None:
        self.device = stages.pick_device(device, threads)
        self.job = make_job(argparse.Namespace(**options, device=str(self.device)))
        self.batch = int(options["batch_size"])

    def do(self, unit: Unit) -> dict[str, Any]:
        inputs = {unit.first + i: tuple(Ref(*ref) for ref in refs) for i, refs in enumerate(unit.inputs)}
        images = range(unit.first, unit.first + unit.images)
        write_part(unit.output, measure_part(self.job.source(inputs), self.job.suite, images, self.batch, ON_RAY))
        return {"machine": machine(self.device)}


def evaluate_on_ray(
    args: argparse.Namespace, options: RayOptions, path: Path
) -> tuple[Job, dict[str, Any], list[str], Result, dict[str, Any]]:
    """What is measured, its protocol, the images' names, the result, and what it was computed on."""
    names, inputs = _list_inputs(args)
    job = make_job(argparse.Namespace(**{**vars(args), "device": "cpu"}))
    protocol = job.for_images(names, inputs)
    if args.decoder == "engine" and args.reconstructions is None:
        here = options.address == LOCAL
        computed_in = compute_dtype(DTYPES[args.dtype], pick_device(args.device))[0] if here else None
        protocol["computed_in"] = str(computed_in or "what the workers have").removeprefix("torch.")
    folder = PartFolder(path.absolute(), len(names), args.batch_size, protocol)  # workers have other directories
    folder.prepare(args.overwrite)
    if args.overwrite:
        (folder.folder / MANIFEST).unlink(missing_ok=True)
    for number in folder.missing():
        folder.path(number).unlink(missing_ok=True)  # one that does not load
    units = [
        Unit(part.start, len(part), str(folder.path(n)), [], [_absolute(inputs[i]) for i in part])
        for n, part in enumerate(folder.parts)
    ]
    adopt(folder.folder, units, lambda unit: {} if Path(unit.output).exists() else None)
    found = list(run_units(EvalWorker, {"options": _worker_options(args)}, units, folder.folder, options))
    kept = sum(not new for _, new in found)
    if kept:
        say(args, f"{kept} of {len(units)} parts were already there")
    # Parts that were measured without Ray do not say where.
    machines = [line["machine"] for line, _ in found if "machine" in line] or [machine(job.suite.device)]
    return job, protocol, names, collect(folder, job.suite), _joined(machines)


def _list_inputs(args: argparse.Namespace) -> tuple[list[str], list[Inputs]]:
    """As without Ray, and images in shards."""
    if args.reconstructions is not None:
        return list_inputs(args)
    refs, names = list_images(args.folder)
    names = [ref.path if ref.size < 0 else name for ref, name in zip(refs, names, strict=True)]
    return names[: args.count], [(ref,) for ref in refs[: args.count]]


def _absolute(refs: Inputs) -> list[list[Any]]:
    return [list(ref._replace(path=str(Path(ref.path).absolute()))) for ref in refs]


def _worker_options(args: argparse.Namespace) -> dict[str, Any]:
    chosen = {name: getattr(args, name) for name in OPTIONS}
    for name in WEIGHTS:
        file = getattr(args, name)
        chosen[name] = file and str(Path(file).absolute())
    chosen["features"] = [f"{n}={Path(file).absolute()}" for n, file in parse_features(args.features).items()]
    return {**chosen, "checkpoint": absolute_checkpoint(args.checkpoint)}


def _joined(machines: list[dict[str, Any]]) -> dict[str, Any]:
    """One machine for the report; where they differ, every value that occurs."""
    values = {key: sorted({m[key] for m in machines}) for key in machines[0]}
    return {key: v[0] if len(v) == 1 else ", ".join(map(str, v)) for key, v in values.items()}
