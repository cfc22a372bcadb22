"""The quality report's baselines and table."""

import sys

import pytest
import torch
from PIL import Image

from msdd_fast import Tokenizer
from msdd_fast.bench import quality
from msdd_fast.metrics.image import psnr


def test_baselines():
    x = torch.rand(2, 3, 64, 64)
    flat = quality.mean_colour(x)
    assert flat.shape == x.shape
    torch.testing.assert_close(flat[:, :, 5, 7], x.mean(dim=(2, 3)))
    smooth = torch.linspace(-1, 1, 64).expand(1, 3, 64, 64)
    assert psnr(quality.shrunk(smooth, 512), smooth) > 30  # 13 x 13 x 3 = 507 numbers
    one = quality.shrunk(x, 3)
    assert (one - one[:, :, :1, :1]).abs().max() < 1e-5


def test_report(tmp_path, monkeypatch, capsys):
    Tokenizer.from_config("tiny").save_pretrained(tmp_path / "tiny")
    (tmp_path / "set").mkdir()
    for i in range(3):
        Image.new("RGB", (64, 64), (80 * i, 20, 90)).save(tmp_path / f"set/{i}.png")
    command = f"quality {tmp_path}/tiny --set s={tmp_path}/set --steps 1 2 --grids uniform authors --speed 0.01"
    command += " --cfg-scale 1 2"
    monkeypatch.setattr(
        sys, "argv", [*command.split(), "--json", str(tmp_path / "q.json"), "--batch-size", "2", "--speed", "0.01"]
    )
    quality.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    names = [line.split("|")[1].strip() for line in lines[2:]]
    assert names[0] == "mean colour" and names[1] == "shrunk to 512 numbers"
    assert names[3:] == [
        f"{n}, {g} grid"
        for n, g in [
            ("1 step, CFG 1", "uniform"),
            ("1 step, CFG 2", "uniform"),
            ("2 steps, CFG 1", "uniform"),
            ("2 steps, CFG 2", "uniform"),
            ("2 steps, CFG 1", "authors"),
            ("2 steps, CFG 2", "authors"),
        ]
    ]
    speeds = [line.split("|")[4].strip() for line in lines[2:]]
    assert all(float(v) > 0 for v in speeds[3:7]) and set(speeds[:3] + speeds[7:]) == {"-"}
    assert float(lines[2].split("|")[2]) > 60  # flat images are their mean colour
    assert (tmp_path / "q.json").exists()


def test_score_averages_over_all_batches():
    images = torch.zeros(5, 3, 16, 16)
    off = torch.tensor([0.1, 0.1, 0.1, 0.2, 0.2])

    def decode(part):
        return images[part.start : part.stop] + off[part.start : part.stop, None, None, None]

    result = quality.score(decode, images, None, 2)
    assert result["psnr_db"] == pytest.approx(psnr(decode(range(5)), images).mean().item(), rel=1e-5)
