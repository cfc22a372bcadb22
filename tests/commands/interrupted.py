"""Commands that write, killed or terminated at random moments and started again: what they leave is whole.

    python -m tests.commands.interrupted [decode|encode] [KILLS [TERMINATIONS]]

A process of its own, with one thread: it forks. A child runs the command; SIGKILL leaves no file that a reader could
take for a result and is not one, SIGTERM leaves nothing else either, and a run that is continued gives the files of one
that was never interrupted.
"""

import hashlib
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from msdd_fast.commands import main as cli
from msdd_fast.io.latents import Latents, save_latents
from tests.perturbed import perturbed

IMAGES = 24
TERMINATED = 143


def forked(words):
    """Process of the command ``words``, silent. It exits with the command's code."""
    pid = os.fork()
    if pid == 0:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 1)
            os.dup2(nothing.fileno(), 2)
        os._exit(cli.main(words))
    return pid


def finished(words):
    """Seconds that the command takes. Raises if it fails."""
    begin, pid = time.monotonic(), forked(words)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code:
        raise SystemExit(f"{words} ended with {code}")
    return time.monotonic() - begin


def content(folder):
    """SHA-256 of every file below a folder, by name."""
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def is_hidden(name):
    return Path(name).name.startswith(".")


def interrupt(words, out, expected, number, seconds, count):
    """What went wrong in ``count`` runs that a signal ended at a random moment, each continuing the one before."""
    faults, ends = [], []
    for _ in range(count):
        if out.exists() and len(content(out)) >= len(expected):
            for path in list(out.rglob("*.*")):
                path.unlink()
        pid = forked(words)
        time.sleep(random.random() * seconds)
        os.kill(pid, number)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        ends.append(code)
        there = content(out) if out.exists() else {}
        faults += [
            f"{n} is not what it should be" for n, h in there.items() if not is_hidden(n) and h != expected.get(n)
        ]
        if number == signal.SIGTERM:
            if code not in (0, TERMINATED, -signal.SIGTERM):
                faults.append(f"SIGTERM ended it with {code}")
            faults += [f"SIGTERM left {n}" for n in there if is_hidden(n)]
    finished(words)
    there = content(out)
    if {n: h for n, h in there.items() if not is_hidden(n)} != expected:
        faults.append("the run that was continued to its end gave other files")
    return faults, ends


def main(command="decode", kills=40, terminations=20):
    torch.set_num_threads(1)
    random.seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        perturbed().save_pretrained(folder / "tiny")
        if command == "decode":
            source = folder / "z.safetensors"
            z = torch.randn(IMAGES, 16, 32, generator=torch.Generator().manual_seed(0))
            save_latents(Latents(z, [f"{i % 3}/{i:02d}" for i in range(IMAGES)]), source)
            options = ["--batch-size", "4"]
        else:
            source = folder / "photos"
            source.mkdir()
            for i in range(IMAGES):
                pixels = np.random.default_rng(i).integers(0, 256, (80, 70, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(source / f"{i:02d}.png")
            options = ["--batch-size", "2", "--shard-size", "4"]
        bad = 0
        words = [command, str(source), "--checkpoint", str(folder / "tiny"), "--device", "cpu", *options, "--out"]
        finished([*words, str(folder / "warm")])
        seconds = finished([*words, str(folder / "whole")])
        expected = content(folder / "whole")
        for number, count in ((signal.SIGKILL, kills), (signal.SIGTERM, terminations)):
            out = folder / number.name
            faults, ends = interrupt([*words, str(out)], out, expected, number, seconds, int(count))
            print(
                f"{command}, {number.name}: {len(ends)} runs, {ends.count(0)} of them done before, {len(faults)} faults"
            )
            print("\n".join(faults), file=sys.stderr, end="")
            bad += len(faults)
    return bad > 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
