"""Distil a trained tokenizer into a student with one step per scale (stage 2). Options come from dataclasses."""

from __future__ import annotations

import argparse

from msdd_fast.commands.common import training_config

HELP = "distil a trained tokenizer into one step per scale"
FORWARDS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser  # everything is forwarded to the parser that tyro makes of DistillConfig


def run(args: argparse.Namespace) -> None:
    from msdd_fast.training.run_stage2 import DistillConfig, train_stage2

    train_stage2(training_config(DistillConfig, "msdd-fast distill", __doc__, args.rest))
