"""What the documents say is what the code does."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from msdd_fast import Tokenizer
from msdd_fast.diffusion.config import ScheduleConfig
from msdd_fast.diffusion.schedule import StageSchedule, build_stages
from msdd_fast.families.msdd.presets import PRESETS
from msdd_fast.training.recipes.msdd_stage1 import time_weight

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_every_environment_variable_is_documented():
    sources = [ROOT / "setup.py", ROOT / "Makefile", ROOT / "tests/conftest.py"]
    for folder in ("msdd_fast", "kernels", "training", "bench"):
        sources += (ROOT / folder).rglob("*.py")
    used = set().union(*(re.findall(r"\bMSDD_FAST_[A-Z0-9_]*[A-Z0-9]\b", f.read_text()) for f in sources))
    for file in (ROOT / "csrc").rglob("*.cpp"):
        used |= set(re.findall(r'getenv\("(MSDD_FAST_\w+)"\)', file.read_text()))
    documented = set(re.findall(r"^\| `(MSDD_FAST_[A-Z0-9_]+)`", (ROOT / "docs/env.md").read_text(), re.M))
    assert used == documented


def test_the_quick_start_runs(tmp_path, monkeypatch):
    """Every Python block of the README, in order, in a folder with a photo.jpg."""
    data = pytest.importorskip("skimage.data", reason="needs scikit-image's photographs")
    from PIL import Image

    Image.fromarray(data.astronaut()).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    scope = {}
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)
    assert (tmp_path / "decoded.png").exists()


def test_the_page_about_ssdd():
    """Its first block runs; what the block on training imports is there."""
    first, *_, training = re.findall(r"```python\n(.*?)```", (ROOT / "docs/ssdd.md").read_text(), re.S)
    scope = {}
    exec(first, scope)
    assert scope["z"].shape == (1, 4, 8, 12) and scope["x"].shape == (1, 3, 64, 96)
    exec("\n".join(line for line in training.splitlines() if line.startswith(("from ", "import "))), {})
    compile(training, "docs/ssdd.md", "exec")


def test_the_table_of_models():
    rows = re.findall(r"^\| `(msdd-[\w-]+)` .*\| ([\d.]+) \+ ([\d.]+) M \|$", README, re.M)
    assert {name for name, *_ in rows} == {name for name in PRESETS if name != "tiny"}
    for name, encoder, decoder in rows:
        with torch.device("meta"):
            tok = Tokenizer(PRESETS[name])
        for part, millions in ((tok.encoder, encoder), (tok.decoder, decoder)):
            count = sum(p.numel() for p in part.parameters()) / 1e6
            assert f"{count:.1f}" == millions, name


def test_the_tables_of_the_specification():
    """Schedules of three and four stages, times of one step and the weighting of stage 1 are what the code computes."""
    spec = (ROOT / "docs/spec.md").read_text()
    for stages in (3, 4):
        table = re.search(rf"\(`num_stages={stages}`\):\n\n.*\n.*\n((?:\|.*\n)+)", spec)[1]
        rows = [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines()]
        assert len(rows) == stages
        for row, s in zip(rows, build_stages(stages), strict=True):
            levels = [s.start_t, s.end_t, s.start_t - s.end_t, s.timestep_max, s.timestep_min, s.timestep_last]
            values = [s.index, *levels, *((s.alpha, s.beta) if s.index else ())]
            for text, value in zip([c for c in row if c], values, strict=True):
                assert text == f"{value:.{len(text.partition('.')[2])}f}"
        times = re.search(rf"^\| {stages} \| (1, [\d., ]+) \| (1, [\d., ]+) \|$", spec, re.M).groups()
        for dtype, text in zip(("float32", "bfloat16"), times, strict=True):
            schedule = StageSchedule(ScheduleConfig(num_stages=stages, timestep_dtype=dtype))
            expected = [schedule.time_grid(s, 1)[0].item() for s in range(stages)]
            assert [float(v) for v in text.split(", ")] == pytest.approx(expected, abs=1e-7)
    t, weights = (
        [float(v) for v in re.search(rf"^\| {re.escape(name)} \| ([\d.| ]+) \|$", spec, re.M)[1].split(" | ")]
        for name in ("t", "w(t)")
    )
    assert time_weight(torch.tensor(t)).tolist() == pytest.approx(weights, rel=0.005)


ROBUSTNESS = (ROOT / "docs/robustness.md").read_text()


def test_the_tests_that_the_page_on_robustness_names_exist():
    rows = re.findall(r"^\| .* \| (.*) \|$", ROBUSTNESS.partition("## What the long runs gave")[0], re.M)
    named = [re.findall(r"`([^`]*)::(\w+)`", held) for held in rows if held != "held by"]
    assert len(named) > 47 and all(named)
    for file, name in sorted({test for tests in named for test in tests}):
        path = ROOT / file if file.startswith("csrc/tests/") else ROOT / "tests" / file
        begin = "void" if path.suffix == ".cpp" else "def"
        assert path.is_file() and re.search(rf"^{begin} {name}\(", path.read_text(), re.M), f"{file}::{name}"


def test_what_the_page_on_robustness_says_was_mended_exists():
    """Each of the 47 entries once; files, folders and the names in them."""
    rows = re.findall(r"^\| (\d+) \| [^|]* \| ([^|]*) \| [^|]* \|$", ROBUSTNESS, re.M)
    assert [int(number) for number, _ in rows] == list(range(1, 48))
    for number, where in rows:
        spans = re.findall(r"`([^`]+)`", where)
        files = [place for span in spans if (place := mended(span)) is not None]
        assert files, f"entry {number} names no file"
        text = "".join(f.read_text() for f in files if f.is_file())
        lost = [span for span in spans if mended(span) is None and span not in text]
        assert not lost, f"entry {number}: {lost}"


def mended(place: str) -> Path | None:
    """A file or folder of the repository; msdd_fast/ may be left out."""
    return next((p for p in (ROOT / "msdd_fast" / place, ROOT / place) if p.exists()), None)


def test_commands_in_the_readme_exist():
    from msdd_fast.commands.main import COMMANDS

    assert set(re.findall(r"^msdd-fast (\w+)", README, re.M)) <= set(COMMANDS)
    targets = re.findall(r"^make ([\w-]+)", README, re.M)
    makefile = (ROOT / "Makefile").read_text()
    assert targets and all(re.search(rf"^{t}:", makefile, re.M) for t in targets)


def test_completion(tmp_path):
    """The function of the page completes commands, in a shell whose msdd-fast prints help."""
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    (script,) = re.findall(r"```bash\n(declare.*?)```", (ROOT / "docs/command-line.md").read_text(), re.S)
    program = tmp_path / "msdd-fast"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m msdd_fast "$@"\n')
    program.chmod(0o755)
    ask = 'COMP_WORDS=(msdd-fast de) COMP_CWORD=1; _msdd_fast; echo "${COMPREPLY[@]}"'
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "COLUMNS": "80"}
    done = subprocess.run(["bash", "-c", script + ask], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["demo", "decode"], done.stderr
