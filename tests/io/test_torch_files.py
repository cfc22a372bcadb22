"""PyTorch files: what is read, what is refused, and that nothing larger than the file is made."""

import argparse
import builtins
import collections
import contextlib
import datetime
import io
import os
import pathlib
import pickle
import struct
import threading
import tracemalloc
import types
import zipfile

import numpy as np
import pytest
import torch

from msdd_fast.errors import CheckpointError
from msdd_fast.io.torch_files import read_torch_file


def saved(path, content, zipped=True):
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.complex64])
def test_tensors(tmp_path, zipped, dtype):
    x = torch.arange(12.0).view(3, 4).to(dtype)
    content = {"x": x, "part": x[1:, ::2], "turned": x.t(), "empty": x[:0], "same": x, "one": x[0, 0]}
    got = read_torch_file(saved(tmp_path / "x.pt", content, zipped))
    for name, tensor in content.items():
        assert got[name].dtype == dtype and got[name].stride() == tensor.stride()
        assert torch.equal(got[name].to(torch.complex64), tensor.to(torch.complex64))
    assert got["x"].data_ptr() == got["same"].data_ptr()


def test_modules_and_optimizers(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    content = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "raw": net[0].weight}
    got = read_torch_file(saved(tmp_path / "x.pt", content))
    assert all(torch.equal(got["model"][n], t) for n, t in net.state_dict().items())
    assert torch.equal(got["optimizer"]["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])


EXTRAS = [
    argparse.Namespace(out=pathlib.PosixPath("/runs/a"), lr=1e-4),
    types.SimpleNamespace(a=1),
    np.float64(0.5),
    np.int64(3),
    np.bool_(True),
    np.str_("best"),
    np.arange(6.0).reshape(2, 3),
    np.asfortranarray(np.arange(6, dtype=np.int32).reshape(2, 3)),
    np.arange(3, dtype=">f4"),
    collections.defaultdict(int, steps=3),
    collections.Counter("aab"),
    collections.OrderedDict(a=1),
    collections.deque([1, 2]),
    datetime.datetime(2026, 1, 2, 3),
    {1, 2},
    frozenset([1]),
    b"bytes",
    b"",
    bytearray(b"bytes"),
    1j,
    2**70,
    torch.Size([2, 3]),
    torch.device("cpu"),
    torch.bfloat16,
    torch.__version__,
    pathlib.PurePosixPath("a/b"),
]


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("extra", EXTRAS, ids=lambda x: type(x).__name__)
def test_harmless_extras(tmp_path, extra, zipped):
    got = read_torch_file(saved(tmp_path / "x.pt", {"w": torch.ones(2), "extra": extra}, zipped))["extra"]
    assert np.array_equal(got, extra) if isinstance(extra, np.ndarray) else got == extra
    assert isinstance(got, type(extra)) or isinstance(extra, str)


class Gadget:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "gadget",
    [
        Gadget(os.system, "touch RAN"),
        Gadget(builtins.eval, "open('RAN', 'w')"),
        Gadget(builtins.getattr, "a", "upper"),
        Gadget(torch.load, "x.pt"),
        Gadget(torch.hub.load, "x", "y"),
        Gadget(np.load, "x.npy"),
        Gadget(bytearray, 10**10),
        Gadget(bytes, 10**10),
        Gadget(torch.Tensor, 10**5, 10**5),
        Gadget(torch.FloatTensor, 10**10),
        Gadget(np.ndarray, (10**10,)),
        Gadget(np.dtype, "V2000000000"),
        Gadget(np.dtype, "O"),
        Gadget(range, 10),
        Gadget(set, range(10**9)),
        torch.nn.Linear(2, 2),
        pathlib.Path.cwd,
    ],
    ids=lambda g: getattr(getattr(g, "call", [g])[0], "__name__", "Linear"),
)
def test_anything_else_is_refused(tmp_path, monkeypatch, gadget, zipped):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "x.pt", {"w": torch.ones(2), "extra": gadget}, zipped)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=r"x\.pt (refused: it holds |is damaged)"):
        read_torch_file(tmp_path / "x.pt")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert not (tmp_path / "RAN").exists() and peak < 50e6


def test_the_message_says_how_to_strip_them(tmp_path):
    saved(tmp_path / "x.pt", {"extra": torch.nn.Linear(2, 2)})
    with pytest.raises(CheckpointError, match=r"holds torch\.nn\.modules\.linear\.Linear, .* keep its weights alone: "):
        read_torch_file(tmp_path / "x.pt")


def rewritten(source, target, change=lambda name, data: data, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for info in old.infolist():
            new.writestr(info.filename, change(info.filename, old.read(info)))
    return target


def test_compressed_files_are_refused(tmp_path):
    """100 MB of zeros in 100 kB."""
    saved(tmp_path / "x.pt", {"w": torch.zeros(25 * 10**6)})
    bomb = rewritten(tmp_path / "x.pt", tmp_path / "bomb.pt", compression=zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 10**6
    with pytest.raises(CheckpointError, match=r"bomb\.pt refused: it holds a compressed part, "):
        read_torch_file(bomb)
    rewritten(tmp_path / "x.pt", tmp_path / "plain.pt")
    assert read_torch_file(tmp_path / "plain.pt")["w"].numel() == 25 * 10**6


def test_views_that_repeat_are_refused(tmp_path):
    path = saved(tmp_path / "x.pt", {"w": torch.ones(1).expand(10**5, 10**5)})
    with pytest.raises(CheckpointError, match="is damaged"):
        read_torch_file(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_sizes_that_the_file_does_not_have(tmp_path, zipped):
    """One storage of 1000 numbers says that it has 2^30."""
    path = saved(tmp_path / "x.pt", {"w": torch.ones(1000)}, zipped)
    old, new = b"M" + struct.pack("<H", 1000), b"J" + struct.pack("<i", 2**30)
    if zipped:
        path = rewritten(path, tmp_path / "y.pt", lambda n, d: d.replace(old, new) if n.endswith(".pkl") else d)
    else:
        assert old in path.read_bytes()
        path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(CheckpointError, match="is damaged"):
        read_torch_file(path)


def test_states_for_what_takes_none(tmp_path):
    """BUILD of a class, a function or a tensor could change what others see."""
    for prefix in (b"cargparse\nNamespace\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"cbuiltins\nset\n)R"):
        stream = io.BytesIO(b"\x80\x02" + prefix + b"}X\x01\x00\x00\x00aK\x01sb.")
        with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
            archive.writestr("x/data.pkl", stream.getvalue())
        with pytest.raises(CheckpointError, match=r"refused|damaged"):
            read_torch_file(tmp_path / "x.pt")
    assert not hasattr(argparse.Namespace, "a")


def test_several_threads(tmp_path):
    """While other threads change what torch.load may load, too."""
    path = saved(tmp_path / "x.pt", {"w": torch.ones(2), "args": argparse.Namespace(a=1)})
    failures, end = [], threading.Event()

    def disturb():
        while not end.is_set():
            with torch.serialization.safe_globals([argparse.Namespace]):
                pass

    def load():
        for _ in range(50):
            try:
                read_torch_file(path)
            except Exception as e:
                failures.append(e)

    other = threading.Thread(target=disturb)
    other.start()
    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    end.set()
    other.join()
    assert not failures


def test_random_changes_are_refused_or_harmless(tmp_path):
    data = bytearray(saved(tmp_path / "x.pt", {"w": torch.ones(3), "e": [np.float64(1), {"a": (1, 2)}]}).read_bytes())
    rng = np.random.default_rng(0)
    for _ in range(300):
        changed = bytearray(data)
        for _ in range(rng.integers(1, 6)):
            changed[rng.integers(0, len(data))] = rng.integers(0, 256)
        (tmp_path / "y.pt").write_bytes(changed)
        with contextlib.suppress(CheckpointError):
            read_torch_file(tmp_path / "y.pt")


def test_pickles_of_other_protocols(tmp_path):
    for protocol in (2, 3, 4, 5):
        torch.save({"w": torch.ones(2), "n": np.float64(1)}, tmp_path / "x.pt", pickle_protocol=protocol)
        assert read_torch_file(tmp_path / "x.pt")["n"] == 1
    assert pickle.HIGHEST_PROTOCOL == 5
