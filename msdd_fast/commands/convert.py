"""Convert a checkpoint of MSDD's or SSDD's authors, or a saved state of a training run (a folder RUN/state/STEP), to a
directory of safetensors and config.json; or SSDD's back."""

from __future__ import annotations

import argparse
from pathlib import Path

from msdd_fast.checkpoint import check_destination, load_pretrained, save_pretrained
from msdd_fast.errors import InputError
from msdd_fast.families.msdd.released import import_authors_verbose
from msdd_fast.families.ssdd.released import export_ssdd, import_ssdd
from msdd_fast.io.files import require_writable

HELP = "authors' checkpoint or a state of a training run -> msdd-fast checkpoint directory"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        help="the authors' file (nothing in it is executed), or RUN/state/STEP; with --export an SSDD checkpoint",
    )
    parser.add_argument("output", help="directory to write; with --export a .safetensors file")
    parser.add_argument(
        "--family", choices=("msdd", "ssdd"), default=None, help="default: ssdd for a .safetensors file, else msdd"
    )
    parser.add_argument("--image-size", type=int, default=256, help="pixels per side (default: 256)")
    parser.add_argument("--weights", choices=("ema", "model"), default=None, help="MSDD: which weights (default: ema)")
    parser.add_argument("--num-stages", type=int, default=None, help="MSDD: scales of the decoder (default: 4)")
    parser.add_argument("--steps", type=int, default=None, help="SSDD: steps of a decode, 1 if distilled (default: 8)")
    parser.add_argument("--export", action="store_true", help="SSDD: from our checkpoint to a file as the authors'")


def run(args: argparse.Namespace) -> None:
    if args.export:
        _export(args)
        return
    if Path(args.source).is_dir():
        _refuse(args, ("family", "num_stages", "steps"), "for a state of a training run")
        check_destination(args.output)
        from msdd_fast.training.loop.state import export_state

        tokenizer = export_state(Path(args.source), args.weights or "ema")
        save_pretrained(tokenizer, args.output)
        print(f"wrote {args.output}: {sum(p.numel() for p in tokenizer.parameters()) / 1e6:.1f} M parameters")
        return
    family = args.family or ("ssdd" if Path(args.source).suffix == ".safetensors" else "msdd")
    _refuse(args, ("weights", "num_stages") if family == "ssdd" else ("steps",), f"for the family {family}")
    check_destination(args.output)
    if family == "ssdd":
        tokenizer = import_ssdd(args.source, args.image_size, 8 if args.steps is None else args.steps)
        notes = []
    else:
        weights, stages = args.weights or "ema", 4 if args.num_stages is None else args.num_stages
        tokenizer, unused = import_authors_verbose(args.source, weights, args.image_size, stages)
        notes = [f"{len(unused)} unused tensors left out: {', '.join(unused)}"]
    save_pretrained(tokenizer, args.output)
    count = sum(p.numel() for p in tokenizer.parameters())
    print(f"wrote {args.output}: {count / 1e6:.1f} M parameters", *notes, sep="\n")


def _export(args: argparse.Namespace) -> None:
    _refuse(args, ("family", "weights", "num_stages", "steps"), "with --export")
    if Path(args.output).suffix != ".safetensors":
        raise InputError(f"output must end in .safetensors, got {args.output}")
    require_writable(args.output)
    export_ssdd(load_pretrained(args.source), args.output)
    print(f"wrote {args.output}")


def _refuse(args: argparse.Namespace, names: tuple[str, ...], where: str) -> None:
    """InputError for an option that would do nothing."""
    for name in names:
        if getattr(args, name) is not None:
            raise InputError(f"--{name.replace('_', '-')} means nothing {where}, got {getattr(args, name)}")
