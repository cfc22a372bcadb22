"""Write a decoder as a program that runs without msdd-fast, for one batch size, height and width.

A .pt2 file is the whole decode, (z, seeds) -> images, for torch.export.load, or with --aot for AOTInductor. An .onnx
file is the network of one scale, (x_t, t, z) -> velocity (needs the extra [export]). The file is loaded again and
compared with the eager model before it takes its place.
"""

from __future__ import annotations

import argparse
from typing import Any

from msdd_fast.commands.arguments import add_steps_and_guidance
from msdd_fast.commands.output import add_json, check_json, finish, say, steps
from msdd_fast.errors import InputError
from msdd_fast.io.arguments import pick_device, positive_int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="bundled name, directory or hub id")
    parser.add_argument("-o", "--out", required=True, help="file to write, .pt2 or .onnx")
    parser.add_argument("--batch-size", type=positive_int, default=1, help="images (default: %(default)s)")
    parser.add_argument("--height", type=positive_int, help="of the images (default: the checkpoint's image_size)")
    parser.add_argument("--width", type=positive_int, help="of the images (default: the checkpoint's image_size)")
    add_steps_and_guidance(parser)
    parser.add_argument("--aot", action="store_true", help="compile the .pt2 with AOTInductor, for this device")
    parser.add_argument("--stage", type=int, help="of an .onnx: 0 is the coarsest scale (default: the finest)")
    parser.add_argument("--device", help="torch device (default: cuda if there is one, else cpu)")
    add_json(parser, "what was written")


def run(args: argparse.Namespace) -> None:
    from msdd_fast.integrations.export import export_decoder, export_network
    from msdd_fast.tokenizer import Tokenizer

    check_json(args)
    if not args.out.endswith((".pt2", ".onnx")):
        raise InputError(f"--out must end in .pt2 or .onnx, got {args.out}")
    onnx = args.out.endswith(".onnx")
    mine: dict[str, Any] = {"steps": args.steps, "cfg_scale": args.cfg_scale, "aot": args.aot or None}
    other: dict[str, Any] = {"stage": args.stage}
    for name, value in (mine if onnx else other).items():
        if value is not None:
            raise InputError(f"--{name.replace('_', '-')} means nothing for {args.out}, got {value}")
    size = {"batch_size": args.batch_size, "height": args.height, "width": args.width}
    with steps(args, 2) as step:
        step("loading")
        tokenizer = Tokenizer.from_pretrained(args.checkpoint).to(pick_device(args.device))
        step("exporting")
        if onnx:
            stage = -1 if args.stage is None else args.stage
            done = export_network(tokenizer, args.out, stage=stage, **size)
        else:
            mine["aot"] = args.aot
            done = export_decoder(tokenizer, args.out, **size, **mine)
    inputs = ", ".join(f"{name} {shape}" for name, shape in done.inputs.items())
    checked = "not run, since onnxruntime is not installed"
    if done.error is not None:
        checked = f"loaded again, it differs from the eager model by at most {done.error:.1e}"
    say(args, f"wrote {args.out}: {inputs} -> {done.output}", checked)
    finish(args, {"out": args.out, **done._asdict()})
