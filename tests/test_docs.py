"""What the documents say is what the code does."""

import re
from pathlib import Path

import pytest
import torch

from msdd_fast import Tokenizer
from msdd_fast.checkpoint import bundled_names
from msdd_fast.families.msdd.presets import PRESETS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_every_environment_variable_is_documented():
    sources = [ROOT / "setup.py", ROOT / "Makefile", ROOT / "tests/conftest.py"]
    for folder in ("msdd_fast", "kernels", "training", "bench"):
        sources += (ROOT / folder).rglob("*.py")
    used = set().union(*(re.findall(r"\bMSDD_FAST_[A-Z0-9_]*[A-Z0-9]\b", f.read_text()) for f in sources))
    documented = set(re.findall(r"^\| `(MSDD_FAST_[A-Z0-9_]+)`", (ROOT / "docs/env.md").read_text(), re.M))
    assert used == documented


def test_the_quick_start_runs(tmp_path, monkeypatch):
    """Every Python block of the README, in order, in a folder with a photo.jpg."""
    if "msdd-nano" not in bundled_names():
        pytest.skip("the bundled checkpoint msdd-nano is not in this tree")
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


def test_links_of_the_documents_lead_somewhere():
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_commands_in_the_readme_exist():
    from msdd_fast.commands.main import COMMANDS

    assert set(re.findall(r"^msdd-fast (\w+)", README, re.M)) <= set(COMMANDS)
    targets = re.findall(r"^make ([\w-]+)", README, re.M)
    makefile = (ROOT / "Makefile").read_text()
    assert targets and all(re.search(rf"^{t}:", makefile, re.M) for t in targets)
