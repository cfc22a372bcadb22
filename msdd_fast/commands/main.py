"""The ``msdd-fast`` command. Exit codes: 0 done, 1 an error (one line on stderr), 2 wrong usage, 130 interrupted."""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence

from msdd_fast import __version__
from msdd_fast.errors import MsddFastError

COMMANDS = (
    *("demo", "reconstruct", "encode", "decode", "eval", "convert"),
    *("train", "distill", "bench", "profile", "tune", "env"),
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="msdd-fast", description="Decode image latents to pixels, fast.")
    parser.add_argument("--version", action="version", version=f"msdd-fast {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="log what the library decides")
    sub = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f"msdd_fast.commands.{name}")
        # `train` and `distill` hand everything to a parser that is generated from their dataclasses.
        forwards = getattr(module, "FORWARDS", False)
        command = sub.add_parser(name, help=module.HELP, description=module.__doc__, add_help=not forwards)
        module.add_arguments(command)
        command.set_defaults(run=module.run, forwards=forwards)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args, rest = build_parser().parse_known_args(argv)
    if rest and not args.forwards:
        build_parser().error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, format="%(name)s: %(message)s")
    try:
        args.run(args)
    except MsddFastError as e:
        print(f"msdd-fast: error: {' '.join(str(e).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("msdd-fast: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
