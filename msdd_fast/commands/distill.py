"""Distil a trained tokenizer into one step per scale. The options are the fields of the program's configuration."""

from __future__ import annotations

import argparse

FORWARDS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser  # the parser that tyro makes of the configuration takes all arguments


def run(args: argparse.Namespace) -> None:
    from msdd_fast.training.command_line import run_command

    run_command("distill", "Distil a tokenizer into one step per scale; the family follows from --teacher.", args.rest)
