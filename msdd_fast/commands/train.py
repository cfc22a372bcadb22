"""Train a tokenizer, stage 1 (multi-scale flow matching). Options come from the training dataclasses."""

from __future__ import annotations

import argparse

from msdd_fast.commands.common import peek, training_config

FORWARDS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser  # everything is forwarded to the parser that tyro makes of TrainConfig


def run(args: argparse.Namespace) -> None:
    from msdd_fast.families.ssdd.presets import SSDD_PRESETS
    from msdd_fast.training.recipes.run_ssdd import SSDDTrainConfig, train_ssdd
    from msdd_fast.training.recipes.run_stage1 import TrainConfig, train_stage1

    if peek(args.rest, "preset") in SSDD_PRESETS:
        train_ssdd(training_config(SSDDTrainConfig, "msdd-fast train", __doc__, args.rest))
        return
    train_stage1(training_config(TrainConfig, "msdd-fast train", __doc__, args.rest))
