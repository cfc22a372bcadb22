"""The table of the fastest backends: lookup, replacement, the command that measures it."""

import json

import pytest
import torch

from msdd_fast import backends
from msdd_fast.backends import tuned as selection
from msdd_fast.commands import main as cli
from msdd_fast.errors import InputError
from msdd_fast.ops.attention import OP

CPU = torch.device("cpu")
HAS_EXTENSION = backends.extension_status()[0]
needs_extension = pytest.mark.skipif(not HAS_EXTENSION, reason=f"msdd_fast._C {backends.extension_status()[1]}")


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """Writes the file that MSDD_FAST_TUNED names; forgets what was read before and after."""
    file = tmp_path / "fastest.json"

    def write(table):
        file.write_text(table if isinstance(table, str) else json.dumps(table))
        forget()
        return file

    def forget():
        selection._table.cache_clear()
        selection._rows.cache_clear()

    monkeypatch.setenv("MSDD_FAST_TUNED", str(file))
    forget()
    yield write
    monkeypatch.undo()
    forget()


def entry(**rows):
    return {selection.machine("cpu", "attention"): {"attention": {"bfloat16": {"64": rows}}}}


def test_the_shipped_table_names_backends_that_exist():
    table = selection.read_table(selection.SHIPPED)
    assert table
    known = {"attention": set(OP.implementations), "linear": {"cpu", "torch"}}
    for ops in table.values():
        for op, dtypes in ops.items():
            for sizes in dtypes.values():
                for rows in sizes.values():
                    assert set(rows.values()) <= known[op] and all(int(n) > 0 for n in rows)


def test_lookup(tuned):
    """The smallest measured number that is not below, else the largest; nothing for what was not measured."""
    tuned(entry(**{"16": "sdpa", "144": "cpu", "1152": "xformers"}))
    found = [selection.fastest("attention", CPU, torch.bfloat16, 64, n) for n in (0, 1, 16, 17, 144, 145, 1152, 5000)]
    assert found == ["sdpa"] * 3 + ["cpu"] * 2 + ["xformers"] * 3
    assert selection.fastest("attention", CPU, torch.bfloat16, 32, 16) is None
    assert selection.fastest("attention", CPU, torch.float32, 64, 16) is None
    assert selection.fastest("swiglu", CPU, torch.bfloat16, 64, 16) is None
    assert selection.fastest("attention", torch.device("meta"), torch.bfloat16, 64, 16) is None


@needs_extension
def test_what_is_measured_of_a_size(tuned):
    rows = {"4": "cpu", "64": "torch"}
    tuned({selection.machine("cpu", "linear"): {"linear": {"float32": {"256x768": rows, "8x9": {"4": "torch"}}}}})
    assert selection.measured("linear", CPU, torch.float32, "256x768") == {"cpu", "torch"}
    assert selection.measured("linear", CPU, torch.float32, "8x9") == {"torch"}
    assert selection.measured("linear", CPU, torch.float32, "768x256") == set()
    assert [selection.fastest("linear", CPU, torch.float32, "256x768", n) for n in (4, 5)] == ["cpu", "torch"]


@needs_extension
def test_auto_takes_the_fastest_that_can_run(tuned):
    q = torch.zeros(1, 20, 2, 64, dtype=torch.bfloat16)
    for named, chosen in (("cpu", "cpu"), ("sdpa", "sdpa"), ("xformers", "sdpa")):
        tuned(entry(**{"16": "sdpa", "144": named}))
        assert OP.select(q, q, q) == chosen
    tuned(entry(**{"144": "cpu"}))
    assert OP.select(q.requires_grad_(), q, q) == "sdpa"
    with torch.no_grad():
        assert OP.select(q, q, q) == "cpu"


def test_a_machine_that_the_file_does_not_name_keeps_what_is_shipped(tuned):
    tuned({"cpu-of-tomorrow": {}})
    assert selection._table() == {**selection.read_table(selection.SHIPPED), "cpu-of-tomorrow": {}}


@pytest.mark.parametrize(
    "content",
    [
        *("[]", "{", '{"cpu": 1}', "[" * 100_000, '{"cpu": {"a": 3}}', '{"cpu": {"a": {"b": []}}}'),
        *('{"cpu": {"a": {"b": {"64": {"x": "cpu"}}}}}', '{"cpu": {"a": {"b": {"64": {"16": 3}}}}}'),
    ],
    ids=lambda content: content[:40],
)
def test_a_damaged_file_is_an_error(tuned, content):
    file = tuned(content)
    with pytest.raises(InputError, match=f"MSDD_FAST_TUNED: {file} .*write it with: msdd-fast tune --out {file}"):
        selection.fastest("attention", CPU, torch.bfloat16, 64, 1)


def test_a_missing_file_is_an_error(tuned):
    with pytest.raises(InputError, match=r"MSDD_FAST_TUNED: .* cannot be read"):
        selection.fastest("attention", CPU, torch.bfloat16, 64, 1)


def test_tune(tuned, tmp_path, monkeypatch, capsys):
    """Also where the variable names a file that is not there yet: it is what the command writes."""
    monkeypatch.setattr("msdd_fast.commands.tuning.QUERIES", (4, 30))
    monkeypatch.setattr("msdd_fast.commands.tuning.ROWS", (2, 7))
    monkeypatch.setattr("msdd_fast.commands.tuning.SIZES", ((8, 24), (24, 8)))
    small = ["tune", "--device", "cpu", "--heads", "1", "--rounds", "2"]
    file = tmp_path / "fastest.json"
    assert cli.main([*small, "--out", str(file)]) == 0
    assert f"export MSDD_FAST_TUNED={file}" in capsys.readouterr().out
    table = json.loads(file.read_text())
    measured = table[selection.machine("cpu", "attention")]
    assert set(measured["attention"]) == {"bfloat16", "float16", "float32"}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        rows = measured["attention"][str(dtype).removeprefix("torch.")]["64"]
        assert list(rows) == ["4", "30"]
        assert selection.fastest("attention", CPU, dtype, 64, 30) == rows["30"]
    if HAS_EXTENSION:
        linear = table[selection.machine("cpu", "linear")]["linear"]
        assert set(linear) == {"bfloat16", "float32"}
        for sizes in linear.values():
            assert list(sizes) == ["8x24", "24x8"] and all(list(rows) == ["2", "7"] for rows in sizes.values())
            assert {name for rows in sizes.values() for name in rows.values()} <= {"cpu", "torch"}
    assert cli.main(small) == 0
    ops = ("attention", "linear") if HAS_EXTENSION else ("attention",)
    assert set(json.loads(capsys.readouterr().out)) == {selection.machine("cpu", op) for op in ops}
    assert cli.main([*small, "--out", str(tmp_path)]) == 1
    assert cli.main([*small[:1], "--device", "nonsense"]) == 1
