"""The ``msdd-fast`` command.

Exit codes: 0 done, 1 an error (one line on stderr), 2 wrong usage, 130 interrupted (Ctrl-C), 141 the reader of the
output is gone, 143 terminated. Only the module of the command that is asked for is imported, so that help is fast.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence

from msdd_fast import __version__
from msdd_fast.io.arguments import renamed
from msdd_fast.io.program import run_program
from msdd_fast.io.threads import wait_passively_if_busy

COMMANDS = {
    "demo": "reconstruct bundled photographs; img/s for each scale",
    "reconstruct": "images -> picture of their reconstruction, with PSNR",
    "encode": "images -> latents (.safetensors)",
    "decode": "latents (.safetensors) -> images",
    "eval": "PSNR, SSIM, LPIPS, FID, KID over a folder, or between two",
    "table": "tables of eval's reports, with the papers' rows",
    "export": "a decoder as a program for torch.export, AOTInductor or ONNX",
    "convert": "authors' checkpoint or a state of a training run -> msdd-fast checkpoint directory",
    "train": "train a tokenizer on image folders or tar shards",
    "distill": "distil a trained tokenizer into one step per scale",
    "serve": "decode over HTTP, requests that arrive together in one batch",
    "bench": "img/s for each scale and provider; --compare finds regressions",
    "profile": "kernels of a decode by time, bytes, FLOP and roofline; traces for Perfetto and Nsight",
    "tune": "measure attention and, on a CPU, matrix products; write the table of the fastest",
    "env": "what this installation and machine offer",
}


# Options of version 0.1 -> their names today. They go in 0.3.
RENAMED = {
    "reconstruct": {"--output": "--out"},
    "encode": {"--output": "--out"},
    "decode": {"--output": "--out"},
    "bench": {"--model": "--checkpoint", "--batch": "--batch-size"},
    "profile": {"--model": "--checkpoint", "--batch": "--batch-size"},
}
# What these time must be what the user's environment gives.
MEASURE = ("bench", "demo", "profile", "tune")
LEVELS = ("-v", "--verbose", "-q", "--quiet")


def build_parser(chosen: str | None = None) -> argparse.ArgumentParser:
    """The parser of the whole command line; only ``chosen`` has its arguments."""
    levels = argparse.ArgumentParser(add_help=False)
    levels.add_argument(
        "-v", "--verbose", action="store_true", default=argparse.SUPPRESS, help="log what the library decides"
    )
    levels.add_argument(
        "-q", "--quiet", action="store_true", default=argparse.SUPPRESS, help="errors only, no progress"
    )
    parser = argparse.ArgumentParser(
        prog="msdd-fast",
        description="Decode image latents to pixels, fast.",
        epilog="msdd-fast COMMAND --help explains a command.",
        parents=[levels],
    )
    parser.add_argument("--version", action="version", version=f"msdd-fast {__version__}")
    sub = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, text in COMMANDS.items():
        if name != chosen:
            sub.add_parser(name, help=text, add_help=False)
            continue
        module = importlib.import_module(f"msdd_fast.commands.{name}")
        # `train` and `distill` hand everything to a parser that is generated from their dataclasses.
        forwards = getattr(module, "FORWARDS", False)
        parents = [] if forwards else [levels]
        command = sub.add_parser(
            name, help=text, description=module.__doc__, add_help=not forwards, allow_abbrev=False, parents=parents
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run, forwards=forwards)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    words = sys.argv[1:] if argv is None else argv
    return run_program(lambda: run(words))


def run(argv: Sequence[str]) -> int:
    """The same inside ``run_program``, which turns errors into exit codes."""
    words = list(argv)
    chosen = next((w for w in words if not w.startswith("-")), None)
    if chosen not in MEASURE:
        wait_passively_if_busy()  # before a command imports PyTorch
    words = renamed(words, RENAMED.get(chosen or "", {}))
    parser = build_parser(chosen)
    args, rest = parser.parse_known_args(words)
    if args.command is None:
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        parser.print_help()
        return 0
    if rest and not args.forwards:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    verbose = getattr(args, "verbose", False) or (args.forwards and not {"-v", "--verbose"}.isdisjoint(rest))
    quiet = getattr(args, "quiet", False) or (args.forwards and not {"-q", "--quiet"}.isdisjoint(rest))
    args.rest = [word for word in rest if not args.forwards or word not in LEVELS]
    level = logging.INFO if verbose else logging.ERROR if quiet else logging.WARNING
    logging.basicConfig(level=level, format="%(name)s: %(message)s")
    args.run(args)
    return 0
