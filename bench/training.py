"""Throughput and memory of stage-1 training on one device, and estimates for whole configurations.

    python -m msdd_fast.bench.training measure --preset msdd-d12 --batch-size 32 64 128 256 --json d12.json
    python -m msdd_fast.bench.training estimate stage1-cross-4scale --measured d12.json --gpus 8

FLOP are those of matrix products and attention (families/work.py); a backward pass counts as two forward passes.
Perceptual networks and discriminators are not counted.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from typing import Any, NamedTuple

import torch

from msdd_fast.bench.decode.models import resolutions_of
from msdd_fast.bench.report.documents import read_json, taken_for
from msdd_fast.bench.report.text import markdown_table
from msdd_fast.bench.timing.ceilings import gemm_rate
from msdd_fast.diffusion.config import Config
from msdd_fast.diffusion.schedule import NUM_TIMESTEPS, StageSchedule
from msdd_fast.errors import InputError
from msdd_fast.families import family_of, get_preset
from msdd_fast.families.work import total
from msdd_fast.io.arguments import pick_device, positive_int, renamed
from msdd_fast.io.files import require_writable
from msdd_fast.io.json_files import write_json
from msdd_fast.io.program import run_program
from msdd_fast.tokenizer import Tokenizer
from msdd_fast.training.config import read_config
from msdd_fast.training.data import ImageDataset
from msdd_fast.training.data.loader import Batch
from msdd_fast.training.loop.config import LoopConfig, OptimConfig
from msdd_fast.training.loop.memory import memory_gib
from msdd_fast.training.loop.trainer import Trainer
from msdd_fast.training.recipes.msdd_stage1 import MSDDTrainConfig, Stage1Config, Stage1Recipe
from msdd_fast.training.recipes.msdd_stage2 import MSDDDistillConfig, Stage2Config

WARM_UP = 3
COLUMNS = ("batch", "img/s", "TFLOP/s", "of a large GEMM", "GiB")
GIB = 2**30


def stage1_flops(
    config: Config, objective: Stage1Config, checkpointing: bool = False, one_step_share: float = 0.0
) -> float:
    """FLOP per image of a step: encoder, and the decoder at ``stages_per_image`` of its scales on average, for one-step
    decodes at all of them.
    """
    scales = _scales(config)
    decoder = sum(scales) * ((1 - one_step_share) * objective.stages_per_image / len(scales) + one_step_share)
    return (4 if checkpointing else 3) * (total(family_of(config).encode_work()).flops + decoder)


def stage2_flops(config: Config, objective: Stage2Config, checkpointing: bool = False) -> float:
    """FLOP per image of a step: encoder forward, the student's unroll with its backward pass, the teacher forward."""

    def branches(cfg_scale: float) -> int:
        return 1 if cfg_scale == 1 else 2

    scales = _scales(config)
    student = (4 if checkpointing else 3) * sum(scales) * branches(objective.student_cfg_scale)
    teacher = 0.0
    if objective.reconstruction_weight > 0:
        teacher = sum(scales) if objective.matches_teacher else _restarted(config, scales)
        teacher *= objective.steps * branches(objective.teacher_cfg_scale)
    return total(family_of(config).encode_work()).flops + student + teacher


def _scales(config: Config) -> list[int]:
    """FLOP of one evaluation at each scale, as the eager model computes it."""
    work = family_of(config).decode_work(hoisted=False)
    return [total(w for w in work if w.scale == resolution).flops for resolution in resolutions_of(config)]


def _restarted(config: Config, scales: list[int]) -> float:
    """Mean over u of the stages from the one whose timesteps hold 1000 u to the last (docs/spec.md#stage2-loss)."""
    tops = [s.timestep_max for s in StageSchedule(config.schedule).stages] + [0.0]
    return sum((tops[s] - tops[s + 1]) / NUM_TIMESTEPS * sum(scales[s:]) for s in range(len(scales)))


class Row(NamedTuple):
    """One batch size: images and FLOP per second, FLOP/s as a fraction of a large GEMM's, and peak memory."""

    batch: int
    img_per_s: float
    flops_per_s: float
    fraction: float
    memory_gib: float


def measure(
    preset: str, batch: int, device: str, steps: int, checkpointing: bool = False, compiled: bool = False
) -> Row:
    """Train ``steps`` steps on random images after a warm-up, in bfloat16 on a GPU and float32 on a CPU."""
    config, where = get_preset(preset), torch.device(device)
    on_gpu = where.type == "cuda"
    loop = LoopConfig(
        steps=steps + WARM_UP,
        batch_size=batch,
        precision="bfloat16" if on_gpu else "float32",
        device=device,
        activation_checkpointing=checkpointing,
        compile=compiled,
    )
    torch.manual_seed(0)
    images = torch.rand(batch, 3, config.image_size, config.image_size) * 2 - 1
    with tempfile.TemporaryDirectory() as out:
        data = ImageDataset([], config.image_size, 0)
        trainer = Trainer(Tokenizer(config), data, Stage1Recipe(Stage1Config()), out, OptimConfig(), loop)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(where)
        images = images.to(where)
        seconds = []
        for i in range(steps + WARM_UP):
            start = time.perf_counter()
            trainer.train_step([Batch(images, torch.arange(i * batch, (i + 1) * batch), [])])
            if on_gpu:
                torch.cuda.synchronize(where)
            seconds.append(time.perf_counter() - start)
    rate = batch / sorted(seconds[WARM_UP:])[steps // 2]
    flops = rate * stage1_flops(config, Stage1Config())  # recomputation does not count as work
    peak = gemm_rate(where, torch.bfloat16 if on_gpu else torch.float32)
    return Row(batch, rate, flops, flops / peak, memory_gib(device))


def measure_all(args: argparse.Namespace) -> None:
    if args.device is None and not torch.cuda.is_available():
        raise InputError("training throughput is measured on a GPU, and none is here; use --device cpu to try it out")
    device = str(pick_device(args.device))
    if args.json:
        require_writable(args.json)
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"
    record: dict[str, Any] = {"preset": args.preset, "device": name, "torch": torch.__version__, "rows": []}
    record |= {"activation_checkpointing": args.activation_checkpointing, "compile": args.compile}
    print(
        f"{args.preset} on {name}", *markdown_table([["batch", "img/s", "TFLOP/s", "of a large GEMM", "GiB"]]), sep="\n"
    )
    for batch in args.batch_size:
        try:
            row = measure(args.preset, batch, device, args.steps, args.activation_checkpointing, args.compile)
        except torch.OutOfMemoryError:
            record["rows"].append({"batch": batch, "out_of_memory": True})
            print(f"| {batch} | out of memory | | | |", flush=True)
            torch.cuda.empty_cache()
            continue
        record["rows"].append(row._asdict())
        print(
            f"| {batch} | {row.img_per_s:.1f} | {row.flops_per_s / 1e12:.2f} | {row.fraction:.1%} "
            f"| {row.memory_gib:.1f} |",
            flush=True,
        )
    if args.json:
        write_json(args.json, record, indent=1)


def estimate(
    config: MSDDTrainConfig | MSDDDistillConfig, preset: str, measured: dict[str, Any], gpus: int
) -> list[str]:
    """Lines that say how long a configuration will take on ``gpus`` such devices, and how much memory each needs."""
    model, loop = get_preset(preset), config.loop
    rows = [row for row in measured["rows"] if not row.get("out_of_memory")]
    if not rows:
        raise InputError("measured must hold at least one batch that fitted, got none")
    if isinstance(config, MSDDTrainConfig):
        share = config.one_step.share
        flops, plain = stage1_flops(model, config.objective, loop.activation_checkpointing, share), False
    else:
        flops, plain = stage2_flops(model, config.objective, loop.activation_checkpointing), True
    speed = max(row["flops_per_s"] for row in rows)
    images = loop.steps * loop.batch_size
    hours = images * flops / (speed * gpus) / 3600
    with torch.device("meta"):
        tokenizer = Tokenizer(model)
    parameters = sum(p.numel() for p in tokenizer.parameters())
    trained = sum(p.numel() for p in tokenizer.decoder.parameters()) if plain else parameters
    # float32: weights and their average; gradients and two moments of what is trained; the teacher.
    fixed = 4 * (2 * parameters + 3 * trained + (parameters if plain else 0)) / GIB
    images_each = max(1, loop.batch_size // gpus)
    micro = images_each if loop.micro_batch is None else min(loop.micro_batch, images_each)
    lines = [
        f"ESTIMATE for {gpus} x {measured['device']}, from {measured['preset']} measured on one",
        f"work: {images / 1e6:.1f} M images of {flops / 1e12:.2f} TFLOP, without perceptual network and discriminator",
        f"time: {hours:.1f} h at {speed / 1e12:.1f} TFLOP/s per device, if it scales perfectly and data keep up",
        f"memory per device: {fixed:.1f} GiB of weights, gradients, moments and average, plus activations",
    ]
    same = measured["preset"] == preset and measured["activation_checkpointing"] == loop.activation_checkpointing
    if isinstance(config, MSDDTrainConfig) and same and len(rows) > 1:
        (a, b) = min(rows, key=lambda r: r["batch"]), max(rows, key=lambda r: r["batch"])
        slope = (b["memory_gib"] - a["memory_gib"]) / (b["batch"] - a["batch"])
        peak = a["memory_gib"] + slope * (micro - a["batch"])
        lines.append(f"together {peak:.1f} GiB with micro-batches of {micro}, on the line through the measured batches")
    else:
        lines.append("activations: not measured for this configuration (another model, stage or checkpointing)")
    return lines


def print_estimate(args: argparse.Namespace) -> None:
    what = "a file that measure wrote"
    measured = read_json(args.measured, what)
    kind: Any = MSDDDistillConfig if args.config.startswith("stage2") else MSDDTrainConfig
    config = read_config(kind, args.config, missing="")
    preset = args.preset or getattr(config, "preset", None)
    if preset is None:
        raise InputError("--preset must name the model of a stage-2 configuration, got none")
    with taken_for(args.measured, what):
        print("\n".join(estimate(config, preset, measured, args.gpus)))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m msdd_fast.bench.training", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("measure", help="img/s, fraction of the peak and memory at several batch sizes")
    one.add_argument("--preset", default="msdd-d12")
    one.add_argument("--batch-size", type=positive_int, nargs="+", default=[32, 64, 128, 256])
    one.add_argument("--steps", type=positive_int, default=10)
    one.add_argument("--device")
    one.add_argument("--activation-checkpointing", action="store_true")
    one.add_argument("--compile", action="store_true")
    one.add_argument("--json", metavar="FILE")
    one.set_defaults(run=measure_all)
    two = commands.add_parser("estimate", help="time and memory of a configuration on such devices")
    two.add_argument("config", help="a configuration's name or file")
    two.add_argument("--measured", required=True, help="what measure wrote")
    two.add_argument("--gpus", type=positive_int, default=8)
    two.add_argument("--preset", help="the model, for stage 2")
    two.set_defaults(run=print_estimate)
    names = {"--batch": "--batch-size", "--out": "--json"}
    args = parser.parse_args(renamed(sys.argv[1:] if argv is None else argv, names))
    return run_program(lambda: args.run(args))


if __name__ == "__main__":
    sys.exit(main())
