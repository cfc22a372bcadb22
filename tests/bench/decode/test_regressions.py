"""Verdicts: what is planted is found, noise is not, and numbers of another device are refused."""

import json
import random
import subprocess
import sys
import time
from functools import partial

import pytest
import torch

from msdd_fast.bench.decode import regressions, trial, worker
from msdd_fast.bench.decode.regressions import Verdict, against_document, is_slower, lines, machine_slowdown, paired
from msdd_fast.bench.report.results import save
from msdd_fast.commands import main as cli
from msdd_fast.errors import InputError
from tests.bench.documents import document

MACHINE_WEATHER = 0.4  # the machine's speed wanders by so much; both sides feel it
JITTER = 0.05


def samples(slowdown, seed, rounds=12):
    """Base and new samples in turns on a machine whose speed changes from round to round."""
    rng = random.Random(seed)
    base, new = [], []
    for _ in range(rounds):
        weather = 1 + MACHINE_WEATHER * rng.random()
        base.append(0.1 * weather * (1 + JITTER * rng.random()))
        new.append(0.1 * weather * (1 + JITTER * rng.random()) * (1 + slowdown))
    return base, new


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_planted_slowdown_of_15_percent_is_found_and_noise_is_not(device):
    for seed in range(100):
        assert paired("x", *samples(0.15, seed), device).slower
        assert not paired("x", *samples(0.0, seed), device).slower


def test_the_ratio_is_the_mean_of_the_middle_half():
    """Of the logarithms: swapping the sides inverts it."""
    base, new = [1e-3] * 8, [1e-4, 2e-4, 1e-3, 1e-3, 1e-3, 1.21**4 * 1e-3, 1.0, 1.0]
    assert paired("x", base, new, "cpu").ratio == pytest.approx(1.21)
    assert paired("x", new, base, "cpu").ratio == pytest.approx(1 / 1.21)


def test_both_thresholds():
    assert not is_slower(100e-6, 119e-6, 1.19, 1.05) and is_slower(1e-3, 1.06e-3, 1.06, 1.05)
    assert not is_slower(1e-3, 1.04e-3, 1.04, 1.05)
    assert is_slower(1e-3, 1.06e-3, 1.06, 1.10, share=0.5) and not is_slower(1e-3, 1.04e-3, 1.04, 1.10, share=0.5)
    base = [1e-3] * 8
    assert paired("x", base, [1.09e-3] * 8, "cpu").slower and not paired("x", base, [1.07e-3] * 8, "cpu").slower
    assert paired("x", base, [1.06e-3] * 8, "cuda").slower and not paired("x", base, [1.04e-3] * 8, "cuda").slower


def test_stored_runs_are_compared_by_case_provider_and_scale():
    base, new = document(), document()
    slow = new["cases"][0]["providers"][1]
    slow["scales"]["16"] = [1.15 * s for s in slow["scales"]["16"]]
    verdicts = {v.name: v for v in against_document(base, new)}
    assert len(verdicts) == 7
    bad = [name for name, v in verdicts.items() if v.slower]
    assert bad == ["tiny decode, batch 2, 1 step, CFG 1, engine-exact, 16 px"]
    assert verdicts[bad[0]].ratio == pytest.approx(1.15)
    slow["scales"]["16"] = [s * 1.09 / 1.15 for s in slow["scales"]["16"]]
    assert not any(v.slower for v in against_document(base, new))  # of other times: more may be chance
    assert (
        "SLOWER" in "\n".join(lines(list(verdicts.values()))) and lines(list(verdicts.values()))[-1] == "1 of 7 slower"
    )


def test_a_machine_that_is_slower_is_no_regression():
    """Plain PyTorch shows it; what became slower than that is still found."""
    base, new = document(), document()
    for case in new["cases"]:
        for provider in case["providers"]:
            provider["samples"] = [1.4 * s for s in provider["samples"]]
            for scale, times in provider.get("scales", {}).items():
                provider["scales"][scale] = [1.4 * s for s in times]
    assert machine_slowdown(base, new) == pytest.approx(1.4) and machine_slowdown(base, base) == 1
    assert not any(v.slower for v in against_document(base, new))
    slow = new["cases"][0]["providers"][1]["scales"]
    slow["16"] = [1.2 * s for s in slow["16"]]
    assert [v.name.split(", ")[-2:] for v in against_document(base, new) if v.slower] == [["engine-exact", "16 px"]]


def test_another_device_or_other_cases_are_refused():
    other = document()
    other["machine"]["cpu"]["model"] = "Abacus"
    with pytest.raises(
        InputError, match=r"--compare must name a run of this device, .*, got one of Abacus, AVX2, 2 thre"
    ):
        against_document(other, document())
    none = document()
    none["cases"] = []
    with pytest.raises(InputError, match="must name a run with a case of this run, got one without"):
        against_document(none, document())


def test_exit_codes(tmp_path, capsys):
    base, new = document(), document()
    save(base, tmp_path / "base.json")
    save(new, tmp_path / "same.json")
    for p in new["cases"][0]["providers"]:
        p["samples"] = [1.15 * s for s in p["samples"]]
    save(new, tmp_path / "slow.json")
    compare = ["bench", "--compare", str(tmp_path / "base.json"), "--from"]
    assert cli.main([*compare, str(tmp_path / "same.json")]) == 0
    assert "none of 7 is slower" in capsys.readouterr().out
    assert cli.main([*compare, str(tmp_path / "slow.json")]) == 1
    assert "error: 2 of 7 cases became slower: tiny decode, batch 2" in capsys.readouterr().err
    assert cli.main(["bench", "--compare", "no-such-revision"]) == 1
    assert "must be a JSON file of msdd-fast bench or a git revision, got 'no-such-revision'" in capsys.readouterr().err
    (tmp_path / "foreign.json").write_text("{}")
    assert cli.main([*compare[:2], str(tmp_path / "foreign.json"), "--gate"]) == 1
    assert "must be a JSON file of msdd-fast bench, format" in capsys.readouterr().err


class FakeWorkers:
    """Both sides; the new one is slower by a factor, and by another after the first so many questions."""

    def __init__(self, monkeypatch, factor, times=10**6, then=1.0):
        self.factor, self.times, self.then, self.order, self.started = factor, times, then, [], 0
        monkeypatch.setattr(regressions, "build", lambda *_: "base")
        monkeypatch.setattr(regressions, "process", self.process)
        monkeypatch.setattr(regressions, "ask", self.ask)

    def process(self, device, path, slowdown=0.0):
        self.started += 1

        class Side:
            name = path or "new"

            def __enter__(side):
                return side

            def __exit__(side, *_):
                pass

        return Side()

    def ask(self, side, line):
        if line.startswith("case"):
            return ["eager"] if side.name == "base" else ["eager", "engine"]
        self.order.append(side.name)
        if side.name == "base":
            return 0.01
        return 0.01 * (self.factor if self.order.count("new") <= self.times else self.then)


def test_sides_take_turns_and_a_suspect_is_measured_again(monkeypatch):
    rounds, case = regressions.MAX_ROUNDS, {"tiny decode 1": 10}
    fake = FakeWorkers(monkeypatch, factor=1.15, times=rounds)
    (verdict,) = regressions.against_revision("main", "cpu", case)
    assert verdict.name == "tiny decode 1, eager" and not verdict.slower  # slow once, not twice
    assert fake.order[:4] == ["base", "new", "new", "base"] and len(fake.order) == 4 * rounds and fake.started == 4
    FakeWorkers(monkeypatch, factor=1.15, then=1.15)
    (verdict,) = regressions.against_revision("main", "cpu", case)
    assert verdict.slower and verdict.ratio == pytest.approx(1.15)
    FakeWorkers(monkeypatch, factor=1.08, times=rounds, then=1.15)
    (verdict,) = regressions.against_revision("main", "cpu", case)
    assert verdict.slower  # the first samples only hinted at it
    (verdict,) = regressions.against_revision("main", "cpu", {"tiny decode 1 eager": 10})
    assert verdict.name == "tiny decode 1, eager"
    with pytest.raises(InputError, match="--compare must name a revision with a provider of this one"):
        regressions.against_revision("main", "cpu", {"tiny decode 1 engine": 10})  # the base has none
    fake = FakeWorkers(monkeypatch, factor=1.04)
    (verdict,) = regressions.against_revision("main", "cpu", case)
    assert not verdict.slower and fake.started == 4  # a suspect, but no more
    fake = FakeWorkers(monkeypatch, factor=1.02)
    (verdict,) = regressions.against_revision("main", "cpu", case)
    assert not verdict.slower and fake.started == 2 and len(fake.order) == 2 * rounds  # no suspect


def test_the_trial_tells_a_gate_that_works_from_one_that_does_not(monkeypatch, capsys, tmp_path):
    def between(base, specs, device, slowdown, found):
        return [Verdict("a", 0.1, 0.1, 1.0, found(slowdown)), Verdict("b", 0.1, 0.1, 1.0, found(slowdown))]

    for found, code, last in (
        (lambda s: s > 0.1, 0, "all 3 as expected"),
        (lambda _: False, 1, "1 of 3 wrong"),
        (lambda _: True, 1, "2 of 3 wrong"),
    ):
        monkeypatch.setattr(trial, "between", partial(between, found=found))
        assert trial.main(["--times", "2", "--json", str(tmp_path / "t.json"), "--device", "cpu"]) == code
        assert capsys.readouterr().out.splitlines()[-1] == last
    assert len(json.loads((tmp_path / "t.json").read_text())["runs"]) == 3


def test_a_planted_slowdown_makes_calls_longer():
    assert worker.seconds(lambda: time.sleep(0.02), torch.device("cpu"), slowdown=1.0) >= 0.04


def test_the_worker_measures_what_it_is_told():
    talk = "case tiny decode 1\ntime engine\ncase tiny encode 1\ntime eager\n"
    done = subprocess.run(
        [sys.executable, worker.__file__, "cpu", "0"], input=talk, capture_output=True, text=True, check=True
    )
    names, engine, encoders, encode = map(json.loads, done.stdout.splitlines())
    assert names == ["eager", "engine"] and encoders == ["eager"] and engine > 0 and encode > 0


def test_verdict_table():
    table = lines([Verdict("a", 0.001, 0.002, 2.0, True), Verdict("b", 0.5, 0.5, 1.0, False)])
    assert table[1].split() == ["a", "1.00", "2.00", "2.000", "SLOWER"] and table[2].split()[-1] == "ok"
