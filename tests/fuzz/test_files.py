"""Files of weights and latents: safetensors, PyTorch's, latents with names."""

import io
import json
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from msdd_fast.io.latents import Latents, load_latents
from msdd_fast.io.safetensors import read_safetensors, read_shapes
from msdd_fast.io.torch_files import read_torch_file
from tests.fuzz.edits import changed, changes, edited, edits
from tests.fuzz.law import obeys

MOST = 2**22  # elements; no file here holds as many


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("files") / "x.safetensors"


# --- safetensors: the header as a document, then all of it as bytes. ---

WEIGHTS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c.d": torch.zeros(0, 5)}


def parts_of(data):
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header, body):
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + body


HEADER, BODY = parts_of(save(WEIGHTS, {"format": "pt"}))


def is_dense(tensors):
    return all(t.numel() < MOST and t.is_contiguous() for t in tensors.values())


@given(changes, edits)
def test_safetensors(path, values, bytes_):
    path.write_bytes(edited(joined(changed(HEADER, values), BODY), [] if values else bytes_))

    def read():
        shapes = read_shapes(path)
        return read_safetensors(path), shapes

    obeys("safetensors", read, lambda r: is_dense(r[0]) and {n: tuple(t.shape) for n, t in r[0].items()} == r[1])


Z = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0))
LATENTS = parts_of(save({"latents": Z}, {"names": json.dumps(["a", "b/c", "d"])}))
NAMES = st.lists(st.sampled_from(["a", "b", "a/b", "../a", "/a", "a//b", ".", "", "a\\b", "a\0", "\ud800", 3, None]))


@given(st.one_of(st.none(), NAMES), changes, edits)
def test_latents(path, names, values, bytes_):
    """Names stay below a folder; there is one for each image."""
    header = changed(LATENTS[0], values)
    if names is not None and isinstance(header, dict):
        header["__metadata__"] = {"names": json.dumps(names)}
    path.write_bytes(edited(joined(header, LATENTS[1]), [] if values or names else bytes_))

    def is_right(found):
        assert isinstance(found, Latents) and len(found.names) == len(found.z) == len(set(found.names))
        return all(not n.startswith("/") and ".." not in n.split("/") for n in found.names)

    obeys("latents", lambda: load_latents(path), is_right)


# --- PyTorch's files: what torch.save writes, then edits of its pickle and of its archive. ---

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False),
    st.text(max_size=4),
    st.binary(max_size=4),
    st.sampled_from([np.float64(0.5), np.int64(3), torch.bfloat16, torch.Size([2])]),
    st.builds(lambda n, seed: torch.full((n, 2), float(seed)), st.integers(0, 3), st.integers(0, 9)),
)
STRUCTURES = st.recursive(
    LEAVES,
    lambda children: st.one_of(
        st.lists(children, max_size=3),
        st.dictionaries(st.text(max_size=3), children, max_size=3),
        st.tuples(children, children),
    ),
    max_leaves=6,
)
PLAIN = {"w": torch.ones(3, 2), "t": torch.arange(4)[1:], "e": [np.float64(1), {"a": (1, 2)}, np.arange(3)]}
# Opcodes with what they read, to be strung together.
PIECES = (
    *(b"}", b"]", b")", b"(", b"t", b"u", b"s", b"a", b"e", b"d", b"l", b"0", b"1", b"2", b"R", b"b", b"\x81", b"Q"),
    *(b"K\x05", b"J\xff\xff\xff\x7f", b"M\x00\x10", b"\x8a\x08" + b"\xff" * 8, b"N", b"\x88", b"q\x00", b"h\x00"),
    *(b"\x94", b"\x93", b"\x92", b"\x85", b"\x86", b"\x87", b"\x8f", b"\x90", b"\x91", b"j\xff\xff\xff\xff"),
    *(b"r\xff\xff\xff\x7f", b"X\x01\x00\x00\x00a", b"C\x02ab", b"\x96\x04" + b"\0" * 11, b"\x95" + b"\xff" * 8),
    *(b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n", b"cbuiltins\nbytearray\n"),
    *(b"cnumpy\ndtype\n", b"cnumpy.core.multiarray\nscalar\n", b"cnumpy.core.multiarray\n_reconstruct\n"),
    *(
        b"cargparse\nNamespace\n",
        b"cos\nsystem\n",
        b"cbuiltins\neval\n",
        b"ctorch\nFloatStorage\n",
        b"cbuiltins\nset\n",
    ),
    *(b"ccollections\ndefaultdict\n", b"cdatetime\ndatetime\n", b"cpathlib\nPosixPath\n", b"c_codecs\nencode\n"),
    *(b"ctorch._utils\n_rebuild_sparse_tensor\n", b"ctorch._tensor\n_rebuild_from_type_v2\n", b"ctorch\ndevice\n"),
)


def saved(content, zipped=True):
    out = io.BytesIO()
    torch.save(content, out, _use_new_zipfile_serialization=zipped)
    return out.getvalue()


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(v, b[k]) for k, v in a.items())
    return a == b


@given(STRUCTURES, st.booleans())
def test_pytorch_structures(path, content, zipped):
    """Whatever consists of what a checkpoint may hold comes back as it was."""
    path.write_bytes(saved(content, zipped))
    obeys(".pt structures", lambda: read_torch_file(path), lambda found: same(content, found))


def is_small(found):
    """No element that the file does not have."""
    if isinstance(found, torch.Tensor):
        return found.is_meta or found.layout != torch.strided or found.numel() < MOST
    if isinstance(found, (bytes, bytearray, str, list, tuple, dict)):
        return len(found) < MOST
    return True


FILES = [saved(PLAIN), saved(PLAIN, zipped=False)]
PICKLE = zipfile.ZipFile(io.BytesIO(FILES[0])).read("archive/data.pkl")


def archive(data):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as new, zipfile.ZipFile(io.BytesIO(FILES[0])) as old:
        for info in old.infolist():
            new.writestr(info.filename, data if info.filename.endswith("data.pkl") else old.read(info))
    return out.getvalue()


EDITED = st.builds(edited, st.sampled_from(FILES), edits)


@given(st.one_of(EDITED, st.builds(archive, st.builds(edited, st.just(PICKLE), edits))))
def test_pytorch_files(path, data):
    path.write_bytes(data)
    obeys(".pt files", lambda: read_torch_file(path), is_small)


@given(st.lists(st.sampled_from(PIECES), max_size=25))
def test_pytorch_pickles(path, pieces):
    """Strings of opcodes: nothing is run, nothing large is made."""
    path.write_bytes(archive(b"\x80\x04" + b"".join(pieces) + pickle.STOP))
    obeys(".pt pickles", lambda: read_torch_file(path), is_small)
