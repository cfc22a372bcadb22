"""Train a tokenizer. The options are the fields of the training program's configuration."""

from __future__ import annotations

import argparse

FORWARDS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser  # the parser that tyro makes of the configuration takes all arguments


def run(args: argparse.Namespace) -> None:
    from msdd_fast.training.command_line import run_command

    run_command("train", "Train a tokenizer; the family follows from --preset.", args.rest)
