"""Distil a trained tokenizer into a student with one step per scale (stage 2). Options come from dataclasses."""

from __future__ import annotations

import argparse

from msdd_fast.commands.common import peek, training_config

FORWARDS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser  # everything is forwarded to the parser that tyro makes of DistillConfig


def run(args: argparse.Namespace) -> None:
    from msdd_fast.checkpoint import load_config, resolve_directory
    from msdd_fast.training.recipes.run_ssdd import SSDDDistillConfig, train_ssdd
    from msdd_fast.training.recipes.run_stage2 import DistillConfig, train_stage2

    teacher = peek(args.rest, "teacher")
    if teacher is not None and load_config(resolve_directory(teacher)).family == "ssdd":
        train_ssdd(training_config(SSDDDistillConfig, "msdd-fast distill", __doc__, args.rest))
        return
    train_stage2(training_config(DistillConfig, "msdd-fast distill", __doc__, args.rest))
