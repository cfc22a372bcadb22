"""Tables and JSON files of the benchmarks."""

import json

import pytest

from msdd_fast.bench.report.documents import read_json
from msdd_fast.bench.report.results import save
from msdd_fast.bench.report.text import COLUMNS, aligned, error_text, markdown_table, number
from msdd_fast.errors import InputError
from msdd_fast.io.json_files import write_json


def test_a_table_is_aligned_and_narrows_its_gaps_to_fit_a_terminal():
    assert aligned([["op", "us"], ["swiglu", "1.5"]]) == ["op       us", "swiglu  1.5"]
    assert aligned([["a", "dtype", ""], ["b", "x", ""]], left=(0, 1)) == ["a  dtype", "b  x"]
    wide = aligned([["x" * 7] * 10])  # 70 letters: two spaces would give 88 columns
    assert len(wide[0]) == 79 <= COLUMNS


def test_markdown():
    assert markdown_table([["", "a"], ["b", "1"]]) == ["|  | a |", "|---|---|", "| b | 1 |"]


def test_numbers_have_three_digits():
    assert [number(x) for x in (1234.5, 99.94, 9.994, 0.1234)] == ["1234", "99.9", "9.99", "0.123"]
    assert error_text(None) == "-" and error_text(1.2e-6) == "1e-06"


def test_documents(tmp_path):
    path = tmp_path / "new" / "x.json"
    save({"rows": [{"provider": "a"}, {"provider": "b"}]}, path)
    assert len(path.read_text().splitlines()) == 3
    assert read_json(path, "a document") == {"rows": [{"provider": "a"}, {"provider": "b"}]}
    write_json(path, [1])
    assert json.loads(path.read_text()) == [1]
    path.write_text("{")
    with pytest.raises(InputError, match=r"x\.json must be a document: "):
        read_json(path, "a document")
