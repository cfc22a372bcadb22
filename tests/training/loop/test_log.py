"""log.jsonl and unreadable.jsonl: figures, which steps, one line for an image, lines that are not ours."""

import io
import json
import sys

import pytest

from msdd_fast.training.loop.log import RunLog, progress_bar, rounded
from tests.training.launch import curve, trainer


def strict(text):
    """JSON without Python's NaN and Infinity."""

    def refuse(name):
        raise ValueError(name)

    return json.loads(text, parse_constant=refuse)


def test_six_significant_digits_and_valid_json(tmp_path):
    values = {"a": 1.23456789e-12, "b": 123456789.0, "c": float("nan"), "d": float("-inf"), "e": 7, "f": -0.5}
    RunLog(tmp_path).write(3, values)
    line = strict((tmp_path / "log.jsonl").read_text())
    assert line == {"step": 3, "a": 1.23457e-12, "b": 123457000.0, "c": None, "d": None, "e": 7, "f": -0.5}
    assert rounded(0.0) == 0.0 and rounded(2e-7) == 2e-7


@pytest.mark.parametrize(("every", "steps"), [(3, [1, 3, 6, 7]), (100, [1, 7]), (1, [*range(1, 8)]), (0, [])])
def test_the_first_and_the_last_step_are_logged(images, tmp_path, every, steps):
    trainer("stage1", images, tmp_path, 7, batch_size=1, log_every=every, sample_every=0, checkpoint_every=0).run()
    found = [line["step"] for line in curve(tmp_path)] if steps else (tmp_path / "log.jsonl").exists()
    assert found == (steps or False)
    assert not list((tmp_path / "samples").iterdir()) and not (tmp_path / "state").exists()


def test_lines_that_are_not_ours(tmp_path, caplog):
    lines = ['{"step": 1}', "[1]", "no", '{"step": "2"}', '{"loss": 1}', "[" * 9000, '{"step": 9}', '{"step": 2}']
    content = "\n".join(lines).encode() + b'\n\xff\xfe\n{"step": 2, "lo'
    (tmp_path / "log.jsonl").write_bytes(content)
    RunLog(tmp_path).cut(5)
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    assert "log.jsonl: 6 lines that are not JSON or have no step were dropped" in caplog.text


def test_validation_of_the_step_is_repeated(tmp_path):
    log = RunLog(tmp_path)
    for step in (1, 2):
        log.write(step, {"loss": 1.0})
        log.write(step, {"val/psnr_db": 20.0})
    log.cut(2)
    assert [strict(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [
        {"step": 1, "loss": 1.0},
        {"step": 1, "val/psnr_db": 20.0},
        {"step": 2, "loss": 1.0},
    ]


def test_each_unreadable_image_once(tmp_path, capsys):
    one, other = RunLog(tmp_path), RunLog(tmp_path)  # of two processes
    one.write_unreadable(1, [("a", "bad a"), ("a", "bad a")])
    other.write_unreadable(2, [("a", "bad a"), ("b", "bad b")])
    one.write_unreadable(3, [("b", "bad b")])
    lines = [json.loads(line) for line in (tmp_path / "unreadable.jsonl").read_text().splitlines()]
    assert [(line["step"], line["image"]) for line in lines] == [(1, "a"), (2, "b")]
    assert capsys.readouterr().err == "skipped: bad a\nskipped: bad b\n"


def test_no_progress_bar_in_a_file(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    bar = progress_bar(0, 3)
    bar.update(3)
    bar.close()
    assert sys.stderr.getvalue() == ""
