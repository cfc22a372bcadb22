"""Loads during saves, and saves that are killed: every load gives the one checkpoint or the other.

    python -m tests.checkpoint_stress [LOADS [KILLS]]

A process of its own, with one thread: it forks.
"""

import dataclasses
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

import msdd_fast
from msdd_fast import checkpoint
from msdd_fast.errors import MsddFastError

SHARD = 500_000  # bytes: several files


def make(seed):
    """A tokenizer whose weights and config both depend on the seed."""
    torch.manual_seed(seed)
    config = msdd_fast.Tokenizer.from_config("tiny").config
    sampling = dataclasses.replace(config.sampling, steps=seed + 1)
    return msdd_fast.Tokenizer.from_config(dataclasses.replace(config, sampling=sampling))


def save_forever(directory, tokenizers):
    while True:
        for tokenizer in tokenizers:
            tokenizer.save_pretrained(directory, max_shard_bytes=SHARD)


def forked(function, *args):
    pid = os.fork()
    if pid == 0:
        try:
            function(*args)
        finally:
            os._exit(1)
    return pid


def kill(pid):
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def which(directory, tokenizers):
    """The steps of the checkpoint that was loaded; 0 if it is none of them."""
    stored = checkpoint.read_pretrained(directory)
    steps = stored.config.sampling.steps
    state = tokenizers[steps - 1].state_dict()
    same = state.keys() == stored.tensors.keys() and all(torch.equal(t, stored.tensors[n]) for n, t in state.items())
    return steps if same else 0


def write_as_0_1(directory, tokenizer):
    directory.mkdir()
    (directory / "config.json").write_text(tokenizer.config.to_json())
    save_file(tokenizer.state_dict(), directory / "model.safetensors")


def loads_during_saves(directory, tokenizers, count):
    """(loads of each, mixed, failed)"""
    write_as_0_1(directory, tokenizers[0])
    saver, found, failed = forked(save_forever, directory, tokenizers[::-1]), [0] * 3, 0
    try:
        for _ in range(count):
            try:
                found[which(directory, tokenizers)] += 1
            except MsddFastError as e:
                print(e, file=sys.stderr)
                failed += 1
            time.sleep(random.random() * 2e-3)
    finally:
        kill(saver)
    return found[1:], found[0], failed


def kills(directory, tokenizers, count):
    """(what was found after each, mixed, failed)"""
    write_as_0_1(directory, tokenizers[0])
    found, failed, begin = [0] * 3, 0, time.monotonic()
    for tokenizer in tokenizers[::-1]:
        tokenizer.save_pretrained(directory, max_shard_bytes=SHARD)
    duration = time.monotonic() - begin
    for _ in range(count):
        saver = forked(save_forever, directory, tokenizers[::-1])
        time.sleep(random.random() * 1.5 * duration)
        kill(saver)
        try:
            found[which(directory, tokenizers)] += 1
        except MsddFastError as e:
            print(e, file=sys.stderr)
            failed += 1
    tokenizers[0].save_pretrained(directory)
    left = {p.name for p in directory.iterdir()} - {"config.json", checkpoint.INDEX_FILE, checkpoint.WEIGHTS_FILE}
    if len(left) != 1:
        print(f"left behind: {left}", file=sys.stderr)
    return found[1:], found[0], failed + (len(left) != 1)


def main(loads=445, crashes=20):
    torch.set_num_threads(1)
    tokenizers = [make(0), make(1)]
    with tempfile.TemporaryDirectory() as folder:
        first = loads_during_saves(Path(folder, "a"), tokenizers, int(loads))
        second = kills(Path(folder, "b"), tokenizers, int(crashes))
    for name, (found, mixed, failed) in (("loads during saves", first), ("kills", second)):
        print(f"{name}: {found[0]} old, {found[1]} new, {mixed} mixed, {failed} failed")
    return any(first[1:]) or any(second[1:])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
