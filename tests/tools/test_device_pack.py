"""The pack of reference data for a GPU machine."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from msdd_fast.errors import InputError
from msdd_fast.training.data import CropConfig, ImageDataset, find_images
from tools.device_pack import choose_quality, pack, write_train_tar


@pytest.fixture
def shared(tmp_path):
    root = tmp_path / "shared"
    (root / "data").mkdir(parents=True)
    (root / "fixtures").mkdir()
    (root / "fixtures/a.safetensors").write_bytes(b"tensors")
    with tarfile.open(root / "data/train256-000.tar", "w") as tar:
        for i in range(4):
            noise = np.random.default_rng(i).integers(0, 255, (16, 16, 3), dtype=np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(noise).resize((64, 64)).save(buffer, format="JPEG")
            info = tarfile.TarInfo(f"{i}.jpg")
            info.size = buffer.tell()
            buffer.seek(0)
            tar.addfile(info, buffer)
    return root


def test_pack(shared, tmp_path, capsys):
    pack(shared, tmp_path / "out")
    assert (tmp_path / "out/fixtures/a.safetensors").read_bytes() == b"tensors"
    packed = find_images([tmp_path / "out/train.tar"])
    assert len(packed) == 4
    before = ImageDataset(find_images([shared / "data/train256-000.tar"]), 64, 0, CropConfig(min_crop=1.0, flip=False))
    after = ImageDataset(packed, 64, 0, CropConfig(min_crop=1.0, flip=False))
    assert (before[0] - after[0]).abs().mean() < 0.1
    assert "4 training images as WebP quality 80" in capsys.readouterr().out


def test_limits(shared, tmp_path):
    refs = find_images([shared / "data/train256-000.tar"])
    assert choose_quality(refs, 10_000) < choose_quality(refs, 10_000_000) == 80
    with pytest.raises(InputError, match="limit must leave room for 4 images, got 100 bytes"):
        write_train_tar(refs, tmp_path / "train.tar", 100)
    assert not list(tmp_path.glob("train*"))
    with pytest.raises(InputError, match=r"SHARED must hold data/train256-\*.tar"):
        pack(tmp_path, tmp_path / "out")
    with pytest.raises(InputError, match=r"the pack must be at most 0.001 MB, got 0\.0 MB"):
        pack(shared, tmp_path / "out", total_mb=0.001)
