"""Distil a trained tokenizer into a student with one step per scale (stage 2). Options come from dataclasses."""

from __future__ import annotations

import argparse

from msdd_fast.errors import InputError

HELP = "distil a trained tokenizer into one step per scale"
FORWARDS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser  # everything is forwarded to the parser that tyro makes of DistillConfig


def run(args: argparse.Namespace) -> None:
    try:
        import tyro
    except ImportError as e:
        raise InputError("training options need tyro: pip install 'msdd-fast[train]'") from e
    from msdd_fast.training.run_stage2 import DistillConfig, train_stage2

    train_stage2(tyro.cli(DistillConfig, prog="msdd-fast distill", description=__doc__, args=args.rest))
