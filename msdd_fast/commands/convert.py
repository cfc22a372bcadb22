"""Convert a checkpoint of a family's authors, or a saved state of a training run (a folder RUN/state/STEP), to a
directory of safetensors and config.json; or, with --export, back to the authors' format."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from msdd_fast.checkpoint import check_destination
from msdd_fast.commands.output import add_json, check_json, finish, say
from msdd_fast.errors import InputError
from msdd_fast.families import families
from msdd_fast.families.base import Option, ReleasedFormat
from msdd_fast.io.files import require_writable
from msdd_fast.tokenizer import Tokenizer


def formats() -> dict[str, ReleasedFormat]:
    """Families whose authors' checkpoints can be read."""
    return {name: family.released for name, family in families().items() if family.released is not None}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    known = formats()
    exporting = [name.upper() for name, f in known.items() if f.export is not None]
    parser.add_argument(
        "source",
        help="the authors' file (nothing in it is executed), or RUN/state/STEP; with --export one of our checkpoints "
        f"({', '.join(exporting)})",
    )
    parser.add_argument("output", help="directory to write; with --export a .safetensors file")
    suffixes = ", ".join(f"{name} for {' and '.join(f.suffixes)}" for name, f in known.items() if f.suffixes)
    parser.add_argument("--family", choices=tuple(known), default=None, help=f"default: {suffixes}")
    uses: dict[str, dict[str, Option]] = {}
    for name, released in known.items():
        for option, use in released.options.items():
            uses.setdefault(option, {})[name.upper()] = use
    for option, by_family in uses.items():
        first = next(iter(by_family.values()))
        who = "" if len(by_family) == len(known) else f"{', '.join(by_family)}: "
        choices = ", ".join(first.choices or ())
        long = len(choices) > 40  # then not in the usage line
        default = "" if first.default == "" else f" (default: {first.default})"
        parser.add_argument(
            _flag(option),
            type=type(first.default),
            choices=first.choices,
            metavar=option.upper() if long else None,
            default=None,
            help=f"{who}{first.help}{f': {choices}' if long else ''}{default}",
        )
    parser.add_argument("--export", action="store_true", help="from our checkpoint to a file in the authors' format")
    add_json(parser, "what was written")


def run(args: argparse.Namespace) -> None:
    check_json(args)
    known, source = formats(), Path(args.source)
    options = {option: getattr(args, option) for f in known.values() for option in f.options}
    given = {option: value for option, value in options.items() if value is not None}
    if args.export:
        _refuse({**given, **_given_family(args)}, (), "with --export")
        if Path(args.output).suffix != ".safetensors":
            raise InputError(f"output must end in .safetensors, got {args.output}")
        require_writable(args.output)
        Tokenizer.from_pretrained(args.source).export_released(args.output)
        say(args, f"wrote {args.output}")
        finish(args, {"out": args.output})
        return
    if source.is_dir():
        _refuse({**given, **_given_family(args)}, ("weights", "image_size"), "for a state of a training run")
        check_destination(args.output)
        from msdd_fast.training.loop.state import export_state

        tokenizer, unused = export_state(source, args.weights or "ema"), []
    else:
        family = args.family or _family_for(source.suffix, known)
        _refuse(given, tuple(known[family].options), f"for the family {family}")
        check_destination(args.output)
        found = known[family].load(source, **given)
        tokenizer, unused = Tokenizer.from_stored(found.config, found.tensors, found.source), found.unused
    tokenizer.save_pretrained(args.output)
    parameters = sum(p.numel() for p in tokenizer.parameters())
    say(args, f"wrote {args.output}: {parameters / 1e6:.1f} M parameters")
    if unused:
        say(args, f"{len(unused)} unused tensors left out: {', '.join(unused)}")
    finish(args, {"out": args.output, "parameters": parameters, "unused": list(unused)})


def _family_for(suffix: str, known: dict[str, ReleasedFormat]) -> str:
    """The family whose files have this suffix, else the first."""
    return next((name for name, f in known.items() if suffix in f.suffixes), next(iter(known)))


def _given_family(args: argparse.Namespace) -> dict[str, Any]:
    return {} if args.family is None else {"family": args.family}


def _flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"


def _refuse(given: dict[str, Any], allowed: tuple[str, ...], where: str) -> None:
    """InputError for an option that would do nothing."""
    for option, value in given.items():
        if option not in allowed:
            raise InputError(f"{_flag(option)} means nothing {where}, got {value}")
