"""Coverage-guided fuzzing of the two parsers that are ours: the reader of PyTorch files, and that of image metadata.

python -m tests.fuzz.parsers torch|metadata [RUNS]        needs: pip install atheris
"""

import contextlib
import io
import os
import sys
import tempfile
import zipfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["msdd_fast.io"]):
    from msdd_fast.errors import CheckpointError
    from msdd_fast.io import metadata, torch_files


def read_pickle(data):
    """As data.pkl of an archive, whose own bytes would be the most of it, and as a file."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("x/data.pkl", data)
        archive.writestr("x/data/0", bytes(32))
    PATH.write_bytes(out.getvalue())
    for content in (out.getvalue(), data):
        PATH.write_bytes(content)
        with contextlib.suppress(CheckpointError):
            torch_files.read_torch_file(PATH)


def read_metadata(data):
    found = metadata.split(data)
    assert len(found.data) <= len(data) + 64
    for head in (b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"II*\0", b"MM\0+"):
        metadata.split(head + data)
    metadata.exif_orientation(data)


def seeds(folder):
    """Inputs to begin with."""
    from tests.fuzz.test_files import PICKLE
    from tests.fuzz.test_images import BLOCK, SAMPLES

    for i, data in enumerate((PICKLE,) if folder.name == "torch" else (*SAMPLES, BLOCK)):
        (folder / str(i)).write_bytes(data[:4096])


if __name__ == "__main__":
    name, runs = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "100000"
    target = {"torch": read_pickle, "metadata": read_metadata}[name]
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        PATH, corpus = Path(folder, "x.pt"), Path(folder, name)
        corpus.mkdir()
        seeds(corpus)
        options = (f"-runs={runs}", "-max_len=4096", "-timeout=20", f"-artifact_prefix={tempfile.gettempdir()}/")
        atheris.Setup([sys.argv[0], *options, str(corpus)], target)
        atheris.Fuzz()
