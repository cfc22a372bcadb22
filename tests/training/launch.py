"""Trainers for the tests, and processes that run them together."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.multiprocessing as mp

from msdd_fast import Tokenizer
from msdd_fast.training.data import ImageDataset, find_images
from msdd_fast.training.loop.config import AdamConfig, LoopConfig, OptimConfig
from msdd_fast.training.loop.objective import Critic
from msdd_fast.training.loop.trainer import Trainer
from msdd_fast.training.losses.dino import random_features
from msdd_fast.training.losses.discriminator import Discriminator
from msdd_fast.training.losses.perceptual import make_perceptual
from msdd_fast.training.recipes.msdd_one_step import OneStepConfig
from msdd_fast.training.recipes.msdd_stage1 import Stage1Config, Stage1Recipe
from msdd_fast.training.recipes.msdd_stage2 import Stage2Config, Stage2Recipe, make_student

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 300


def trainer(kind, images, out, steps=4, optimizer="adamw", **loop):
    """A tiny run of "stage1", "one-step", "adversarial" or "teacher-matching" on 64 px; the same weights every time."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_config("tiny")
    loop = {"batch_size": 4, "precision": "float32", "device": "cpu", "workers": 0, "log_every": 1, **loop}
    dataset = ImageDataset(find_images([images]), 64, seed=0)
    optim = OptimConfig(optimizer=optimizer, lr=2e-3, warmup_steps=2, ema_decay=0.9)
    if kind in ("stage1", "one-step"):
        config = Stage1Config(stages_per_image=2, start_fraction=0.2)
        one_step = OneStepConfig(share=0.75 if kind == "one-step" else 0.0)  # of each batch, one image learns the flow
        recipe = Stage1Recipe(config, None, one_step)
        return Trainer(tokenizer, dataset, recipe, out, optim, LoopConfig(steps=steps, **loop))
    config = Stage2Config(
        recipe=kind, teacher_steps=2, context_dropout=0.2, perceptual_crop=48, image_weight=0.5, consistency_weight=0.1
    )
    discriminator = None if config.matches_teacher else Discriminator(random_features())
    recipe = Stage2Recipe(config, tokenizer, make_perceptual("random"), discriminator)
    critic = None
    if discriminator is not None:
        critic = Critic(discriminator, recipe.critic_loss, AdamConfig(lr=1e-3, warmup_steps=2))
    return Trainer(make_student(tokenizer), dataset, recipe, out, optim, LoopConfig(steps=steps, **loop), critic=critic)


def command(images, out, steps=4, **loop):
    """The same as ``msdd-fast train``."""
    loop = {
        "steps": steps,
        "batch_size": 4,
        "precision": "float32",
        "device": "cpu",
        "workers": 0,
        "log_every": 1,
        **loop,
    }
    options = [f"--loop.{name.replace('_', '-')}={value}" for name, value in loop.items()]
    optim = ["--optim.lr=2e-3", "--optim.warmup-steps=2", "--optim.ema-decay=0.9"]
    return ["train", f"--data={images}", f"--out={out}", "--preset=tiny", *optim, *options]


def curve(out):
    """log.jsonl as a list of mappings, without what depends on the machine."""
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("img_per_s", "seconds", "memory_gib")} for line in lines]


def free_port():
    """A port below those that the kernel gives out by itself: no other group's connection takes it in the meantime."""
    while True:
        port = random.SystemRandom().randint(20000, 32000)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


def environment(rank, world, port):
    """What torchrun sets for a process of one machine."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    return {**{k: str(v) for k, v in names.items()}, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}


def spawn(function, world, *args, meanwhile=lambda: None):
    """``function(*args)`` in ``world`` processes of one gloo group; an error or a hang in one ends all.

    ``meanwhile`` is called here while they run.
    """
    context = mp.spawn(_in_group, (world, free_port(), function, args), nprocs=world, join=False)
    try:
        meanwhile()
    except BaseException:
        for process in context.processes:
            process.kill()
        raise
    end = time.monotonic() + TIMEOUT
    while not context.join(timeout=5):
        if time.monotonic() > end:
            for process in context.processes:
                process.kill()
            raise AssertionError(f"{function.__name__} in {world} processes was not done after {TIMEOUT} s")


def _in_group(rank, world, port, function, args):
    from msdd_fast.training.loop.distributed import process_group

    os.environ.update(environment(rank, world, port))
    torch.set_num_threads(1)
    with process_group("cpu"):
        function(*args)
    # Not through the interpreter's end, where a process once died of std::terminate after all was done (1 of 30 runs of
    # one test; probably a thread of PyTorch's group). The tests of whole commands end as users' runs do.
    sys.stderr.flush()
    os._exit(0)


def start(world, arguments):
    """``msdd-fast ARGUMENTS`` in ``world`` processes, as torchrun would start them."""
    port = free_port()
    plain = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "msdd_fast", *map(str, arguments)],
            env={**plain, "OMP_NUM_THREADS": "1", **(environment(rank, world, port) if world > 1 else {})},
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for rank in range(world)
    ]


def finish(processes):
    """(exit status, stderr) of each; kills what does not end."""
    results = []
    try:
        for process in processes:
            _, err = process.communicate(timeout=TIMEOUT)
            results.append((process.returncode, err))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return results
