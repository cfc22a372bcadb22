"""Safetensors files whose headers lie."""

import json
import struct

import pytest

from msdd_fast.commands.shards import names_in
from msdd_fast.errors import CheckpointError, InputError
from msdd_fast.io.latents import latents_head, load_latents, load_rows
from msdd_fast.io.safetensors import LARGEST_SIZE, read_safetensors, read_shapes


@pytest.fixture
def file(tmp_path):
    """A file with ``latents`` of a shape that has no elements."""

    def write(shape):
        header = {"latents": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}, "__metadata__": {"names": "[]"}}
        text = json.dumps(header).encode()
        path = tmp_path / "z.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text)
        return path

    return write


@pytest.mark.parametrize("shape", [[0, 2**63, 4], [0, 2**64 - 1, 4], [2**63, 0, 4]])
def test_sizes_that_no_tensor_has_are_refused_by_every_reader(file, shape):
    path = file(shape)
    for read in (read_safetensors, read_shapes):
        with pytest.raises(CheckpointError, match=r"is damaged or not a safetensors file: latents has the shape \("):
            read(path)
    for read in (load_latents, latents_head, lambda p: load_rows(p, 0, 1)):
        with pytest.raises(InputError, match="is damaged or not a safetensors file"):
            read(path)
    assert names_in(path) is None


def test_the_largest_size_is_read(file):
    path = file([0, LARGEST_SIZE])
    assert read_shapes(path) == {"latents": (0, LARGEST_SIZE)}
    assert read_safetensors(path)["latents"].shape == (0, LARGEST_SIZE)
