"""The ``msdd-fast`` command.

Exit codes: 0 done, 1 an error (one line on stderr), 2 wrong usage, 130 interrupted (Ctrl-C), 141 the reader of the
output is gone, 143 terminated. Only the module of the command that is asked for is imported, so that help is fast.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from msdd_fast import __version__
from msdd_fast.errors import MsddFastError

COMMANDS = {
    "demo": "reconstruct bundled photographs; img/s for each scale",
    "reconstruct": "images -> picture of their reconstruction, with PSNR",
    "encode": "images -> latents (.safetensors)",
    "decode": "latents (.safetensors) -> images",
    "eval": "PSNR, SSIM and perceptual distance over a folder",
    "convert": "authors' checkpoint or a state of a training run -> msdd-fast checkpoint directory",
    "train": "train a tokenizer on image folders or tar shards",
    "distill": "distil a trained tokenizer into one step per scale",
    "serve": "decode over HTTP, requests that arrive together in one batch",
    "bench": "img/s for each scale and provider; --compare finds regressions",
    "profile": "kernels of a decode by time, bytes, FLOP and roofline; traces for Perfetto and Nsight",
    "tune": "measure the attention backends and write the table of the fastest",
    "env": "what this installation and machine offer",
}


def build_parser(chosen: str | None = None) -> argparse.ArgumentParser:
    """The parser of the whole command line; only ``chosen`` has its arguments."""
    levels = argparse.ArgumentParser(add_help=False)
    levels.add_argument(
        "-v", "--verbose", action="store_true", default=argparse.SUPPRESS, help="log what the library decides"
    )
    levels.add_argument("-q", "--quiet", action="store_true", default=argparse.SUPPRESS, help="log errors only")
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
    words = list(sys.argv[1:] if argv is None else argv)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started this
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (open until the process ends)
    try:
        before = signal.signal(signal.SIGTERM, _terminate)
    except ValueError:  # not in the main thread
        before = None
    try:
        code = _run(words)
        sys.stdout.flush()
        return code
    except MsddFastError as e:
        return _fail(f"error: {' '.join(str(e).split())}", 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        _drop_output()
        return 141
    except OSError as e:  # a full disk, most often that of stdout
        _drop_output()
        where = "" if e.filename is None else f": {e.filename}"
        return _fail(f"error: {e.strerror or e}{where}", 1)
    except _TerminatedError:
        return _fail("terminated", 143)
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _run(words: list[str]) -> int:
    chosen = next((w for w in words if not w.startswith("-")), None)
    parser = build_parser(chosen)
    args, rest = parser.parse_known_args(words)
    if args.command is None:
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        parser.print_help()
        return 0
    if rest and not args.forwards:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest
    verbose, quiet = getattr(args, "verbose", False), getattr(args, "quiet", False)
    level = logging.INFO if verbose else logging.ERROR if quiet else logging.WARNING
    logging.basicConfig(level=level, format="%(name)s: %(message)s")
    args.run(args)
    return 0


def _drop_output() -> None:
    """Python flushes stdout once more at exit, which must not fail again."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _TerminatedError(BaseException):
    """SIGTERM, as an exception: what is being written is cleaned up on the way out."""


def _terminate(number: int, frame: FrameType | None) -> None:
    raise _TerminatedError


def _fail(message: str, code: int) -> int:
    print(f"msdd-fast: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
