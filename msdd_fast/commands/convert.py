"""Convert a checkpoint of the MSDD authors' code (.pt), or a saved state of a training run (a folder RUN/state/STEP),
to a directory of safetensors and config.json."""

from __future__ import annotations

import argparse
from pathlib import Path

from msdd_fast.checkpoint import check_destination, import_authors_verbose, save_pretrained

HELP = "authors' .pt checkpoint or a state of a training run -> msdd-fast checkpoint directory"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="the authors' .pt file (nothing in it is executed), or RUN/state/STEP")
    parser.add_argument("output", help="directory to write")
    parser.add_argument(
        "--weights", choices=("ema", "model"), default="ema", help="which set of weights (default: ema)"
    )
    parser.add_argument("--image-size", type=int, default=256, help="pixels per side (default: 256)")
    parser.add_argument("--num-stages", type=int, default=4, help="scales of the decoder (default: 4)")


def run(args: argparse.Namespace) -> None:
    check_destination(args.output)
    if Path(args.source).is_dir():
        from msdd_fast.training.state import export_state

        tokenizer = export_state(Path(args.source), args.weights)
        save_pretrained(tokenizer, args.output)
        print(f"wrote {args.output}: {sum(p.numel() for p in tokenizer.parameters()) / 1e6:.1f} M parameters")
        return
    tokenizer, unused = import_authors_verbose(args.source, args.weights, args.image_size, args.num_stages)
    save_pretrained(tokenizer, args.output)
    count = sum(p.numel() for p in tokenizer.parameters())
    print(f"wrote {args.output}: {count / 1e6:.1f} M parameters")
    print(f"{len(unused)} unused tensors left out: {', '.join(unused)}")
