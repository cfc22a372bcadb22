"""The folder of a run that can be continued: --overwrite removes its own files, never anybody else's."""

import json

import pytest

from msdd_fast.commands.record import prepare_folder
from msdd_fast.errors import InputError

OPTIONS = {"files": "parts", "content": "figures"}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["model.safetensors", "encode.json", "0.safetensors"])
def test_a_folder_of_something_else_is_left_alone(tmp_path, name, overwrite):
    for file in (name, "000000.safetensors"):
        (tmp_path / file).write_bytes(b"precious")
    with pytest.raises(InputError, match=f"must hold nothing but parts of this command, got {name}"):
        prepare_folder(tmp_path, "eval.json", {"seed": 0}, overwrite, **OPTIONS)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {
        name: b"precious",
        "000000.safetensors": b"precious",
    }


def test_its_own_files_stay_until_they_are_of_another_run(tmp_path):
    prepare_folder(tmp_path, "eval.json", {"seed": 0, "size": (1, 2)}, False, **OPTIONS)
    part = tmp_path / "000000.safetensors"
    part.write_bytes(b"figures")
    prepare_folder(tmp_path, "eval.json", {"seed": 0, "size": (1, 2)}, False, **OPTIONS)
    assert part.exists()
    with pytest.raises(InputError, match=r"holds figures of another run \(other seed\): use --overwrite"):
        prepare_folder(tmp_path, "eval.json", {"seed": 1, "size": (1, 2)}, False, **OPTIONS)
    assert part.exists() and json.loads((tmp_path / "eval.json").read_text())["seed"] == 0
    prepare_folder(tmp_path, "eval.json", {"seed": 1, "size": (1, 2)}, True, **OPTIONS)
    assert not part.exists() and json.loads((tmp_path / "eval.json").read_text())["seed"] == 1
