"""The one writer: atomic, into devices and through links, modes; JSON and paths that are refused."""

import io
import os
import stat
import subprocess
import sys
import threading

import pytest
import torch

from msdd_fast.errors import InputError
from msdd_fast.io.files import as_path, atomic_write, is_standard_output, read_json, require_writable
from msdd_fast.io.latents import Latents, save_latents


def write(path, text="new"):
    with atomic_write(path) as temporary:
        temporary.write_text(text)


def test_regular_file(tmp_path):
    path = tmp_path / "a" / "b" / "x.txt"
    write(path)
    assert path.read_text() == "new" and os.listdir(path.parent) == ["x.txt"]
    write(path, "newer")
    assert path.read_text() == "newer" and os.listdir(path.parent) == ["x.txt"]


def test_content_is_on_the_disk_before_the_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    write(tmp_path / "x.txt")
    assert len(calls) == 3 and calls[0].endswith(".txt") and calls[1:] == ["replace", str(tmp_path)]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_modes_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        write(tmp_path / "x.txt")
        save_latents(Latents(torch.zeros(1, 4, 2), ["a"]), tmp_path / "z.safetensors")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()} == {0o666 & ~umask}


def test_links_are_followed(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "x.txt").write_text("old")
    (tmp_path / "link").symlink_to("there/x.txt")
    (tmp_path / "dangling").symlink_to("there/y.txt")
    for link, file in (("link", "x.txt"), ("dangling", "y.txt")):
        require_writable(tmp_path / link)
        write(tmp_path / link)
        assert (tmp_path / link).is_symlink() and (tmp_path / "there" / file).read_text() == "new"
    assert sorted(os.listdir(tmp_path / "there")) == ["x.txt", "y.txt"]


def test_devices_and_fifos_are_written_into(tmp_path):
    require_writable("/dev/null")
    write("/dev/null")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    fifo, got = tmp_path / "fifo", []
    os.mkfifo(fifo)
    require_writable(fifo)
    reader = threading.Thread(target=lambda: got.append(fifo.read_text()))
    reader.start()
    write(fifo)
    reader.join()
    assert got == ["new"] and stat.S_ISFIFO(fifo.stat().st_mode) and os.listdir(tmp_path) == ["fifo"]


def test_an_output_that_takes_text_only(monkeypatch):
    """As ``contextlib.redirect_stdout(io.StringIO())`` and notebooks make it."""
    text = io.StringIO("before ")
    text.seek(0, io.SEEK_END)
    monkeypatch.setattr(sys, "stdout", text)
    write("-", "größer")
    assert text.getvalue() == "before größer"
    with pytest.raises(InputError, match=r"output must be a file here, got -: sys\.stdout takes text only"):
        with atomic_write("-") as temporary:
            temporary.write_bytes(b"\x89PNG")
    assert text.getvalue() == "before größer"


def test_a_process_without_standard_output(monkeypatch, tmp_path):
    """As pythonw has none."""
    monkeypatch.setattr(sys, "stdout", None)
    for call in (lambda: require_writable("-"), lambda: write("-")):
        with pytest.raises(InputError, match="output must be a file here, got -: the process has no standard output"):
            call()
    write(tmp_path / "x.txt")
    assert (tmp_path / "x.txt").read_text() == "new"


STANDARD_OUTPUT = ["-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"]


@pytest.mark.parametrize("kind", ["pipe", "file"])
def test_standard_output(tmp_path, kind):
    """Also where it is a regular file: what was printed before and after stays in it."""
    code = f"""if True:
        from msdd_fast.io.files import atomic_write, require_writable
        for path in {STANDARD_OUTPUT!r}:
            print("before", path)
            require_writable(path)
            with atomic_write(path) as temporary:
                temporary.write_bytes(b"new\\n")
            print("after")
    """
    if kind == "pipe":
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=tmp_path).stdout
    else:
        with open(tmp_path / "out", "ab") as f:
            subprocess.run([sys.executable, "-c", code], stdout=f, check=True, cwd=tmp_path)
        out = (tmp_path / "out").read_bytes()
    assert out.decode() == "".join(f"before {path}\nnew\nafter\n" for path in STANDARD_OUTPUT)
    assert os.listdir(tmp_path) == (["out"] if kind == "file" else [])
    assert all(map(is_standard_output, STANDARD_OUTPUT))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ZeroDivisionError()])
def test_failures_leave_the_old_file_and_nothing_else(tmp_path, error):
    write(tmp_path / "x.txt", "old")
    expected = InputError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected), atomic_write(tmp_path / "x.txt") as temporary:
        temporary.write_text("half")
        raise error
    assert (tmp_path / "x.txt").read_text() == "old" and os.listdir(tmp_path) == ["x.txt"]


def test_a_file_that_is_a_mount_point(tmp_path, monkeypatch):
    def busy(source, target):
        raise OSError(16, "Device or resource busy")

    write(tmp_path / "x.txt", "old and longer")
    monkeypatch.setattr(os, "replace", busy)
    write(tmp_path / "x.txt")
    assert (tmp_path / "x.txt").read_text() == "new" and os.listdir(tmp_path) == ["x.txt"]


@pytest.mark.parametrize("path", [None, 3, b"bytes", "", "a\0b", object(), True])
def test_wrong_kinds_of_path(path):
    for call in (lambda: write(path), lambda: require_writable(path), lambda: as_path("output", path)):
        with pytest.raises(InputError, match=r"(path|output) must (be a str or a path|not hold a NUL|name a file)"):
            call()


def test_paths_that_no_file_can_have(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / ("x" * 300), tmp_path / "file" / "x", "/proc/msdd/x"):
        for call in (write, require_writable):
            with pytest.raises(InputError, match="cannot write "):
                call(path)
    with pytest.raises(InputError, match="output must be a file, got the folder"):
        require_writable(tmp_path)
    with pytest.raises(InputError, match="cannot write "):
        write(tmp_path)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a": 1, "a": 2}', "key 'a' is there twice"),
        ("{", "Expecting property name"),
        ("1" * 10_000, "Exceeds the limit"),
    ],
)
def test_json_that_is_refused(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_json(tmp_path / "x.json")


def test_json_that_is_too_large(tmp_path):
    with open(tmp_path / "x.json", "wb") as f:
        f.truncate(300 * 2**20)
    with pytest.raises(ValueError, match="larger than"):
        read_json(tmp_path / "x.json")
