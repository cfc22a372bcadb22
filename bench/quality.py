"""Reconstruction quality of a checkpoint over sets, steps, guidance and time grids, with baselines.

    python -m msdd_fast.bench.quality msdd-nano --set kodak24=DIR --set imagenet=DIR --vgg19 FILE --json out.json

Prints Markdown tables. Two baselines put the metrics into perspective: the image's mean colour, and the image shrunk to
as many numbers as its latents hold and enlarged again. ``--speed SECONDS`` adds img/s of the engine's exact tier at
``--batch-size``: the median decode of that many seconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from msdd_fast.bench.report.text import markdown_table
from msdd_fast.bench.timing.clock import WallTimer
from msdd_fast.diffusion.schedule import StageSchedule
from msdd_fast.engine import accelerate
from msdd_fast.errors import InputError
from msdd_fast.families import family_of
from msdd_fast.io.arguments import positive_int, renamed
from msdd_fast.io.files import require_writable
from msdd_fast.io.images import CROP_DESCRIPTION, center_crop, find_image_files, load_image, to_tensor
from msdd_fast.io.json_files import write_json
from msdd_fast.io.program import run_program
from msdd_fast.metrics.image import figures
from msdd_fast.metrics.vgg19 import Vgg19Distance
from msdd_fast.sampling import VelocityModel, sample
from msdd_fast.tokenizer import Tokenizer

COLUMNS = {
    "psnr_db": ("PSNR (dB)", ".2f"),
    "ssim": ("SSIM", ".3f"),
    "vgg19_distance": ("VGG-19 distance", ".3f"),
    "images_per_second": ("img/s", ".2f"),
}


def mean_colour(x: Tensor) -> Tensor:
    """Every image (B, 3, H, W) replaced by its mean colour."""
    return x.mean(dim=(2, 3), keepdim=True).expand_as(x)


def shrunk(x: Tensor, numbers: int) -> Tensor:
    """Images kept as k x k x 3 <= ``numbers`` values: antialiased bicubic down, bicubic up."""
    k = int((numbers / 3) ** 0.5)
    small = F.interpolate(x, size=(k, k), mode="bicubic", antialias=True)
    return F.interpolate(small, size=x.shape[-2:], mode="bicubic")


def chunks(count: int, size: int) -> list[range]:
    """Consecutive index ranges of at most ``size``."""
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


@torch.no_grad()
def score(
    decode: Callable[[range], Tensor], images: Tensor, distance: Vgg19Distance | None, batch: int
) -> dict[str, float]:
    """Mean metrics of ``decode(indices)`` against ``images`` (N, 3, R, R)."""
    sums: dict[str, float] = {}
    for part in chunks(len(images), batch):
        x, y = images[part.start : part.stop], decode(part)
        for name, value in figures(y, x, distance).items():
            sums[name] = sums.get(name, 0.0) + float(value.sum())
    return {name: value / len(images) for name, value in sums.items()}


def evaluate_set(
    tokenizer: Tokenizer, images: Tensor, distance: Vgg19Distance | None, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """One row for every baseline and every setting."""
    cfg = tokenizer.config
    numbers = math.prod(family_of(cfg).example)
    z = torch.cat([tokenizer.encode(images[p.start : p.stop]) for p in chunks(len(images), args.batch_size)])

    def row(name: str, decode: Callable[[range], Tensor], **speed: float) -> dict[str, Any]:
        result = {"what": name, **score(decode, images, distance, args.batch_size), **speed}
        print(f"  {name}: {result['psnr_db']:.2f} dB", flush=True)
        return result

    rows = [
        row("mean colour", lambda p: mean_colour(images[p.start : p.stop])),
        row(f"shrunk to {numbers} numbers", lambda p: shrunk(images[p.start : p.stop], numbers)),
        row("stage-0 clean estimate, enlarged", lambda p: stage0(tokenizer, z[p.start : p.stop], p.start)),
    ]
    for grid in args.grids:
        schedule = StageSchedule(dataclasses.replace(cfg.schedule, time_grid=grid))
        for steps in args.steps:
            if steps == 1 and grid != args.grids[0]:
                continue  # one step is the same in every grid
            for scale in args.cfg_scale:

                def decode(
                    p: range, schedule: StageSchedule = schedule, steps: int = steps, scale: float = scale
                ) -> Tensor:
                    out = sample(
                        cast(VelocityModel, tokenizer.decoder),
                        z[p.start : p.stop],
                        schedule,
                        steps=steps,
                        cfg_scale=scale,
                        seed=p.start,
                    )
                    assert isinstance(out, Tensor)
                    return out

                speed = {}
                if args.speed and grid == cfg.schedule.time_grid:
                    speed["images_per_second"] = engine_speed(tokenizer, z[: args.batch_size], steps, scale, args.speed)
                rows.append(row(f"{steps} step{'s' * (steps > 1)}, CFG {scale:g}, {grid} grid", decode, **speed))
    return rows


def engine_speed(tokenizer: Tokenizer, z: Tensor, steps: int, cfg_scale: float, seconds: float) -> float:
    """Images per second of the engine on latents (B, N, D), by the median decode."""
    engine = accelerate(tokenizer, steps=steps, cfg_scale=cfg_scale, batch_sizes=(len(z),))
    engine.warmup()
    timer, samples = WallTimer(), [0.0]
    while len(samples) < 4 or sum(samples) < seconds:
        samples.append(timer.seconds(lambda: engine.decode(z), 1))
    return len(z) / statistics.median(samples[1:])


def stage0(tokenizer: Tokenizer, z: Tensor, seed: int) -> Tensor:
    """The clean estimate of the first stage, enlarged bicubically to full size."""
    seen: list[Tensor] = []
    tokenizer.decode(z, seed, stage_callback=lambda r: seen.append(r.clean))
    size = tokenizer.config.image_size
    return F.interpolate(seen[0], size=(size, size), mode="bicubic")


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table with one line per row."""
    columns = [c for c in COLUMNS if any(c in r for r in rows)]
    table = [["", *(COLUMNS[c][0] for c in columns)]]
    table += [[r["what"], *(format(r[c], COLUMNS[c][1]) if c in r else "-" for c in columns)] for r in rows]
    return "\n".join(markdown_table(table))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="bundled name, directory or hub id")
    parser.add_argument("--set", action="append", required=True, metavar="NAME=DIR", dest="sets")
    parser.add_argument("--vgg19", metavar="FILE")
    parser.add_argument("--steps", type=positive_int, nargs="+", default=[1, 4, 30])
    parser.add_argument("--cfg-scale", type=float, nargs="+", default=[1.0, 1.5, 2.0])
    parser.add_argument("--grids", nargs="+", default=["uniform"], choices=["uniform", "authors"])
    parser.add_argument("--batch-size", type=positive_int, default=8)
    parser.add_argument("--speed", type=float, default=0.0, metavar="SECONDS", help="also time the engine")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(renamed(sys.argv[1:] if arguments is None else arguments, {"--cfg": "--cfg-scale"}))
    if args.json:
        require_writable(args.json)
    for item in args.sets:
        if not all(item.partition("=")):
            raise InputError(f"--set must be NAME=DIR, got {item!r}")
    tokenizer = Tokenizer.from_pretrained(args.checkpoint)
    distance = Vgg19Distance(args.vgg19) if args.vgg19 else None
    size = tokenizer.config.image_size
    report: dict[str, Any] = {"checkpoint": args.checkpoint, "crop": f"{CROP_DESCRIPTION}, to {size} px", "sets": {}}
    for item in args.sets:
        name, _, folder = item.partition("=")
        images = torch.stack([to_tensor(center_crop(load_image(f), size)) for f in find_image_files(folder)])
        print(f"{name}: {len(images)} images", flush=True)
        report["sets"][name] = {"count": len(images), "rows": evaluate_set(tokenizer, images, distance, args)}
    for name, data in report["sets"].items():
        print(f"\n{name} ({data['count']} images, {report['crop']})\n\n{markdown(data['rows'])}")
    if args.json:
        write_json(args.json, report, indent=1)


if __name__ == "__main__":
    sys.exit(run_program(main))
