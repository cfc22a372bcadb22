"""Convert a checkpoint of the MSDD authors' code (.pt) to a directory of safetensors and config.json."""

from __future__ import annotations

import argparse

from msdd_fast.checkpoint import check_destination, import_authors_verbose, save_pretrained

HELP = "authors' .pt checkpoint -> msdd-fast checkpoint directory"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="the authors' .pt file; nothing in it is executed")
    parser.add_argument("output", help="directory to write")
    parser.add_argument(
        "--weights", choices=("ema", "model"), default="ema", help="which set of weights (default: ema)"
    )
    parser.add_argument("--image-size", type=int, default=256, help="pixels per side (default: 256)")
    parser.add_argument("--num-stages", type=int, default=4, help="scales of the decoder (default: 4)")


def run(args: argparse.Namespace) -> None:
    check_destination(args.output)
    tokenizer, unused = import_authors_verbose(args.source, args.weights, args.image_size, args.num_stages)
    save_pretrained(tokenizer, args.output)
    count = sum(p.numel() for p in tokenizer.parameters())
    print(f"wrote {args.output}: {count / 1e6:.1f} M parameters")
    print(f"{len(unused)} unused tensors left out: {', '.join(unused)}")
