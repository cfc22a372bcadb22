"""Find regressions: compare a run with a stored one, or the working tree with a git revision on this machine.

Against a stored run, a case fails if it takes more than 10 % longer on a CPU (5 % on a GPU) and more than 20 us longer.

Against a revision, two processes run the same worker and take turns, one call each, so that whatever slows the machine
slows both. We compare interquartile means of paired ratios and fail above 1.08 on a CPU (1.05 on a GPU). On one noisy
machine the interquartile mean deviated 4 to 15 % less than the median.

A case that exceeds a third of the threshold is a suspect: two fresh processes measure it for the same time again, and
the verdict uses all samples. A false alarm then needs two unlucky measurements, and a slowdown that the first samples
only hinted at is found.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msdd_fast.bench.decode import worker
from msdd_fast.bench.report.results import device_of, measurements
from msdd_fast.bench.report.text import aligned, number
from msdd_fast.bench.timing.machine import ROOT
from msdd_fast.errors import InputError

RATIO = {"cpu": 1.10, "cuda": 1.05}
RATIO_IN_TURNS = {"cpu": 1.08, "cuda": 1.05}
SECONDS = 20e-6
SUSPECT = 1 / 3
CACHE = ROOT / "build" / "revisions"
# "model kind batch [provider]" to seconds of measuring. The gate takes at most a minute: twice these seconds if every
# case is a suspect, and twice the start of the workers. Calls are short, since verdicts need many rounds.
GATE = {"msdd-nano decode 1 engine": 4.5, "msdd-nano decode 8 engine": 12.0, "msdd-nano encode 1": 2.5}
ALL = {
    "msdd-nano decode 1": 12.0,
    "msdd-nano decode 8": 20.0,
    "msdd-nano encode 1": 6.0,
    "msdd-nano encode 8": 20.0,
    "msdd-d12 decode 1": 120.0,
    "msdd-d12-joint decode 1": 120.0,
}
MIN_ROUNDS, MAX_ROUNDS = 5, 200

Samples = dict[str, tuple[list[float], list[float]]]
"""Provider to the samples of the base and of the new side, in turns."""


@dataclass(frozen=True)
class Verdict:
    """One case: seconds of the base and of the new code, and whether that is a regression."""

    name: str
    base: float
    new: float
    ratio: float
    slower: bool


def is_slower(base: float, new: float, ratio: float, limit: float, share: float = 1.0) -> bool:
    """Whether both thresholds are exceeded: ``limit`` for the ratio, and ``SECONDS``; ``share`` scales them down."""
    return ratio > 1 + share * (limit - 1) and new - base > share * SECONDS


def paired(name: str, base: Sequence[float], new: Sequence[float], device: str, share: float = 1.0) -> Verdict:
    """Verdict of samples taken in turns: the ratio is the interquartile mean of the paired ratios (of their logs)."""
    logs = sorted(math.log(n / b) for b, n in zip(base, new, strict=True))
    ratio = math.exp(statistics.fmean(logs[len(logs) // 4 : len(logs) - len(logs) // 4]))
    old = statistics.median(base)
    return Verdict(
        name, old, statistics.median(new), ratio, is_slower(old, old * ratio, ratio, RATIO_IN_TURNS[device], share)
    )


def against_document(base: Mapping[str, Any], new: Mapping[str, Any]) -> list[Verdict]:
    """Verdicts for every case, provider and scale that both runs have, relative to ``machine_slowdown``.

    Raises InputError if they are from different devices, or have no case in common.
    """
    if device_of(base) != device_of(new):
        raise InputError(
            f"--compare must name a run of this device, {device_of(new)}, got one of {device_of(base)}: "
            "times of different devices say nothing about the code"
        )
    old, slowdown = dict(_medians(base)), machine_slowdown(base, new)
    verdicts = []
    for name, seconds in _medians(new):
        if name in old:
            expected = old[name] * slowdown
            ratio = seconds / expected
            verdicts.append(
                Verdict(name, old[name], seconds, ratio, is_slower(expected, seconds, ratio, RATIO[new["device"]]))
            )
    if not verdicts:
        raise InputError("--compare must name a run with a case of this run, got one without")
    return verdicts


def machine_slowdown(base: Mapping[str, Any], new: Mapping[str, Any]) -> float:
    """How many times as long plain PyTorch takes, which cannot have changed: the median over its cases.

    1 if that is within the threshold, or if one of the runs has no case of it.
    """
    old = dict(_medians(base))
    ratios = [s / old[n] for n, s in _medians(new) if n in old and n.split(", ")[-2].startswith("eager")]
    ratio = statistics.median(ratios) if ratios else 1.0
    return ratio if ratio > RATIO[new["device"]] else 1.0


def _medians(document: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for result in document["cases"]:
        for provider in result["providers"]:
            for scale, m in measurements(provider):
                part = "whole" if scale == "whole" else f"{scale} px"
                yield f"{result['case']['name']}, {provider['provider']}, {part}", m.median


def against_revision(
    revision: str,
    device: str,
    specs: Mapping[str, float],
    progress: Callable[[str], None] = lambda _: None,
) -> list[Verdict]:
    """Compare the working tree with ``revision``; ``specs``: "model kind batch [provider]" to seconds.

    Raises InputError for an unknown revision or one that cannot be built.
    """
    return between(build(revision, progress), specs, device, progress=progress)


def between(
    base: Path | None,
    specs: Mapping[str, float],
    device: str,
    slowdown: float = 0.0,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Verdict]:
    """Compare the running package with the one in the folder ``base`` (None: with itself).

    ``slowdown``: make every call of the new side longer by this share, to test that the gate finds it.
    """
    samples: dict[str, Samples] = {}
    suspects: dict[str, list[str]] = {}
    with process(device, base) as old, process(device, None, slowdown) as new:
        for spec, seconds in specs.items():
            progress(f"measuring {spec}")
            names = [n for n in start(old, spec) if n in set(start(new, spec))]
            samples[spec] = take(old, new, names, seconds)
            found = [n for n in names if paired(n, *samples[spec][n], device, SUSPECT).slower]
            if found:
                suspects[spec] = found
    if not any(samples.values()):
        raise InputError("--compare must name a revision with a provider of this one, got one without")
    if suspects:
        with process(device, base) as old, process(device, None, slowdown) as new:
            for spec, names in suspects.items():
                progress(f"measuring {spec} again: {', '.join(names)}")
                start(old, spec), start(new, spec)
                for name, (more_old, more_new) in take(old, new, names, specs[spec]).items():
                    samples[spec][name][0].extend(more_old)
                    samples[spec][name][1].extend(more_new)
    return [
        paired(f"{' '.join(spec.split()[:3])}, {name}", *pair, device)
        for spec, taken in samples.items()
        for name, pair in taken.items()
    ]


def take(old: subprocess.Popen[str], new: subprocess.Popen[str], names: Sequence[str], seconds: float) -> Samples:
    """Rounds in which each side makes one call of each provider; the sides alternate in going first."""
    samples: Samples = {name: ([], []) for name in names}
    begin = time.perf_counter()
    for r in range(MAX_ROUNDS):
        if r >= MIN_ROUNDS and time.perf_counter() - begin > seconds:
            break
        for name in names:
            pair = [(old, samples[name][0]), (new, samples[name][1])]
            for side, kept in pair if r % 2 == 0 else pair[::-1]:
                kept.append(float(ask(side, f"time {name}")))
    return samples


@contextlib.contextmanager
def process(device: str, path: Path | None, slowdown: float = 0.0) -> Iterator[subprocess.Popen[str]]:
    """A worker over the package in ``path`` (None: the running one), slower by the share ``slowdown``."""
    environment = dict(os.environ)
    if path is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(path), *filter(None, [environment.get("PYTHONPATH")])])
    child = subprocess.Popen(
        # By path and not as a module: both sides run this very file.
        [sys.executable, worker.__file__, device, str(slowdown)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def start(child: subprocess.Popen[str], spec: str) -> list[str]:
    """Providers of a case, ready and warm; only the one that the spec names, if it does."""
    words = spec.split()
    names: list[str] = ask(child, f"case {' '.join(words[:3])}")
    return [name for name in names if len(words) == 3 or name == words[3]]


def ask(child: subprocess.Popen[str], line: str) -> Any:
    """Send one line to a worker and return its answer. Raises InputError if it has died."""
    stdin, stdout = child.stdin, child.stdout
    assert stdin is not None and stdout is not None
    try:
        stdin.write(line + "\n")
        stdin.flush()
        return json.loads(stdout.readline())
    except (BrokenPipeError, ValueError) as error:
        raise InputError(f"the process that measures one side of the comparison died at {line!r}") from error


def build(revision: str, progress: Callable[[str], None]) -> Path:
    """A folder with the installed package of ``revision``, kept for the next time."""
    commit = _run(["git", "-C", str(ROOT), "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}"])
    if not commit:
        raise InputError(f"--compare must be a JSON file of msdd-fast bench or a git revision, got {revision!r}")
    target = CACHE / commit
    if (target / "done").exists():
        return target
    progress(f"building {commit[:10]}")
    tree = CACHE / f"{commit}.tree"
    _run(["git", "-C", str(ROOT), "worktree", "add", "--force", "--detach", str(tree), commit])
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--upgrade"]
    try:
        done = subprocess.run([*pip, "--target", str(target), str(tree)], capture_output=True, text=True, check=False)
    finally:
        _run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(tree)])
    if done.returncode:
        raise InputError(f"--compare {revision}: cannot be built: {(done.stderr.splitlines() or ['?'])[-1]}")
    (target / "done").touch()
    return target


def _run(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def lines(verdicts: Sequence[Verdict]) -> list[str]:
    """Table and summary."""
    rows = [["case", "base ms", "new ms", "new/base", ""]]
    rows += [
        [v.name, number(v.base * 1e3), number(v.new * 1e3), f"{v.ratio:.3f}", "SLOWER" if v.slower else "ok"]
        for v in verdicts
    ]
    count = sum(v.slower for v in verdicts)
    return [*aligned(rows), f"{count} of {len(verdicts)} slower" if count else f"none of {len(verdicts)} is slower"]
