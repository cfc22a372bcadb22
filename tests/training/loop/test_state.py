"""Saved states: checksums, hostile files, which states stay, metadata of wrong shape, other data."""

import dataclasses
import hashlib
import json
import os
import pickle
import random
import shutil
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp

from msdd_fast import Tokenizer
from msdd_fast.commands.main import main
from msdd_fast.errors import CheckpointError
from msdd_fast.training.loop.old_state import read_old_tensors
from msdd_fast.training.loop.state import StateStore, read_metadata, read_tensors, verify
from tests.training.launch import spawn, trainer

TENSORS = {
    "a": torch.arange(6.0).view(2, 3).T,  # not contiguous
    "b": torch.tensor(1.5, dtype=torch.float64),
    "c": torch.zeros(0, 3),
    "d": torch.tensor([True, False]),
    "e": torch.full((3, 5), 0.3, dtype=torch.bfloat16),
    "f": torch.tensor([-(2**40)]),
}


def save(folder, step=1, keep=2, best=None, **metadata):
    store = StateStore(folder, keep)
    store.save(step, TENSORS, {"step": step, **metadata}, best)
    return store.path(step)


def assert_same(found):
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype


def test_tensors_of_every_kind(tmp_path):
    path = save(tmp_path)
    assert_same(read_tensors(path))
    assert list(read_tensors(path, "b")) == ["b"] and read_metadata(path) == {"step": 1}
    lines = dict(reversed(line.split("  ")) for line in (path / "SHA256SUMS").read_text().splitlines())
    assert lines == {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in path.iterdir() if p.name != "SHA256SUMS"
    }


def test_two_processes_share_the_tensors(tmp_path):
    spawn(save, 2, tmp_path)
    path = tmp_path / "00000001"
    assert len(list(path.glob("tensors-*-of-00002.safetensors"))) == 2
    assert_same(read_tensors(path))
    next(path.glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read_tensors(path)


def test_every_flipped_bit_is_found(tmp_path):
    path, rng = save(tmp_path, note="x" * 50), random.Random(0)
    for file in path.iterdir():
        good = file.read_bytes()
        for place in [0, len(good) - 1, *(rng.randrange(len(good)) for _ in range(40))]:
            bad = bytearray(good)
            bad[place] ^= 1 << rng.randrange(8)
            file.write_bytes(bad)
            with pytest.raises(CheckpointError, match=r"damaged|cannot be read"):
                verify(path)
        file.write_bytes(good[:-1])
        with pytest.raises(CheckpointError):
            verify(path)
        file.write_bytes(good)
    verify(path)


def test_names_in_the_sums_stay_in_the_folder(tmp_path):
    path = save(tmp_path)
    sums = path / "SHA256SUMS"
    for name in ("../../x", "/etc/passwd", "tensors-00000-of-00001.safetensors\n"):
        sums.write_text(f"{sums.read_text()}{'0' * 64}  {name}\n")
        with pytest.raises(CheckpointError, match="damaged"):
            read_tensors(path)


class Gadget:
    """Runs a command when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def gadgets(mark):
    return {
        "posix.system": Gadget(os.system, f"touch {mark}"),
        "builtins.exec": Gadget(exec, f"open({str(mark)!r}, 'w')"),
        "builtins.getattr": Gadget(getattr, dict, "get"),
        "torch.serialization.load": Gadget(torch.load, "x"),
        "shutil.rmtree": [{"deep": (Gadget(shutil.rmtree, str(mark.parent / "none")),)}],
    }


def old_state(path, config):
    path.mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about being a single process
        dcp.save({"ema.x": torch.zeros(3)}, storage_writer=dcp.FileSystemWriter(path), no_dist=True)
    (path / "facts.json").write_text(json.dumps({"config": config}))
    return path


@pytest.mark.parametrize("name", ["posix.system", "builtins.exec", "builtins.getattr", "torch.serialization.load"])
def test_a_state_that_holds_a_command_is_refused(tmp_path, name, capsys):
    mark = tmp_path / "RAN"
    path = old_state(tmp_path / "state/00000010", Tokenizer.from_config("tiny").config.to_dict())
    (path / ".metadata").write_bytes(pickle.dumps(gadgets(mark)[name]))
    assert main(["convert", str(path), str(tmp_path / "out")]) == 1
    assert f".metadata refused: it holds {name}, and a state may hold only" in capsys.readouterr().err
    assert not mark.exists() and not (tmp_path / "out").exists()


def change_index(path, **changes):
    index = dcp.FileSystemReader(path).read_metadata()
    index.storage_data = {at: dataclasses.replace(i, **changes) for at, i in index.storage_data.items()}
    (path / ".metadata").write_bytes(pickle.dumps(index))


def test_commands_in_other_places_of_a_state(tmp_path):
    mark = tmp_path / "RAN"
    for i, (name, gadget) in enumerate(gadgets(mark).items()):
        path = old_state(tmp_path / f"{i}", {})
        for zipped in (True, False):
            torch.save(gadget, path / "__0_0.distcp", _use_new_zipfile_serialization=zipped)
            change_index(path, offset=0, length=(path / "__0_0.distcp").stat().st_size)
            with pytest.raises(CheckpointError, match=f"__0_0.distcp refused: it holds .*{name.split('.')[-1]},"):
                read_old_tensors(path)
        change_index(path, relative_path="../0/__0_0.distcp")
        with pytest.raises(CheckpointError, match="is not a file of a state"):
            read_old_tensors(path)
    for protocol in range(6):
        (path / ".metadata").write_bytes(pickle.dumps(gadgets(mark)["posix.system"], protocol))
        with pytest.raises(CheckpointError, match=r"it holds posix\.system"):
            read_old_tensors(path)
    new = save(tmp_path / "new")
    for file in new.iterdir():
        content = file.read_bytes()
        file.write_bytes(pickle.dumps(gadgets(mark)["posix.system"]))
        with pytest.raises(CheckpointError):
            read_tensors(new)
        file.write_bytes(content)
    (new / ".metadata").write_bytes(pickle.dumps(gadgets(mark)["posix.system"]))  # nobody reads it
    assert_same(read_tensors(new))
    assert not mark.exists()


def test_a_hostile_state_is_not_passed_over(images, tmp_path):
    run = trainer("stage1", images, tmp_path, 4)
    run.step = 1
    run.save_state()
    for file in ({"step": 2}, b"{"):  # with good and with damaged metadata
        path = old_state(tmp_path / "state/00000002", {})
        if isinstance(file, bytes):
            (path / "facts.json").write_bytes(file)
        (path / ".metadata").write_bytes(pickle.dumps(Gadget(os.system, f"touch {tmp_path / 'RAN'}")))
        with pytest.raises(CheckpointError, match=r"00000002/.metadata refused: it holds posix\.system"):
            trainer("stage1", images, tmp_path, 4)
        assert not (tmp_path / "RAN").exists()
        shutil.rmtree(path)


def damage(path):
    file = next(path.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-5] ^= 4
    file.write_bytes(data)


def test_damaged_states_count_for_nothing(tmp_path):
    """With keep 1 and a damaged state of a higher number, the state just saved stays."""
    for step in (1, 5):
        save(tmp_path, step, keep=9)
    damage(tmp_path / "00000005")
    store = StateStore(tmp_path, keep=1)
    _, metadata = store.load({})
    assert metadata == {"step": 1}
    for step in (2, 3):
        store.save(step, TENSORS, {"step": step})
        assert store.steps() == [step, 5]
    store.save(5, TENSORS, {"step": 5})
    assert store.steps() == [5] and StateStore(tmp_path, 1).load({})[1] == {"step": 5}
    for step in (6, 7):  # 6 is damaged, and this process has not read it
        save(tmp_path, step, keep=9)
    damage(tmp_path / "00000006")
    save(tmp_path, 8, keep=3)
    assert [s for s in StateStore(tmp_path, 1).steps() if s != 6] == [5, 7, 8]
    assert save(tmp_path, 9, keep=1, best=7) and StateStore(tmp_path, 1).steps() == [7, 9]


def test_what_is_no_state(tmp_path):
    for name in ("12", "x", "\u0660" * 8, "00000001.old"):
        (tmp_path / name).mkdir()
    (tmp_path / "00000007").write_text("a file")
    store = StateStore(tmp_path, 1)
    assert store.steps() == [] and store.load({}) is None


@pytest.mark.parametrize(
    "change", [{"step": "2"}, {"guard": [1]}, {"guard": {"means": 3}}, {"best": {"step": 1}}, {"unreadable": -1}]
)
def test_metadata_of_wrong_shape_are_passed_over_with_a_word(images, tmp_path, caplog, change):
    run = trainer("stage1", images, tmp_path, 4)
    for run.step in (1, 2):
        run.save_state()
    tensors, metadata = read_tensors(run.store.path(2)), {**read_metadata(run.store.path(2)), **change}
    run.store.save(2, tensors, metadata)
    assert trainer("stage1", images, tmp_path, 4).step == 1
    assert "its metadata are damaged" in caplog.text and "continuing from the state before it" in caplog.text


def test_tensors_of_another_model(images, tmp_path):
    run = trainer("stage1", images, tmp_path, 4)
    run.save_state()
    run.store.save(0, TENSORS, read_metadata(run.store.path(0)))
    with pytest.raises(CheckpointError, match="its tensors are not this run's"):
        trainer("stage1", images, tmp_path, 4)


def test_resuming_on_other_data_says_so(images, tmp_path, caplog):
    run = trainer("stage1", images, tmp_path / "run", 4)
    run.save_state()
    trainer("stage1", images, tmp_path / "run", 4)
    assert "images" not in caplog.text
    shutil.copytree(images, tmp_path / "other")
    (tmp_path / "other/0.png").unlink()
    trainer("stage1", tmp_path / "other", tmp_path / "run", 4)
    assert "the images are not those of" in caplog.text and "(6 images there, 5 now)" in caplog.text
