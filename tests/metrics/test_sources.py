"""Messages that miss a network's weights say where they are, and their hash is that of the file."""

import hashlib
import re

import pytest

from msdd_fast.errors import CheckpointError, ConfigError
from msdd_fast.metrics.lpips import LpipsVgg
from msdd_fast.metrics.vgg19 import Vgg19Distance
from msdd_fast.training.losses import dino
from msdd_fast.training.losses.perceptual import make_perceptual, require_perceptual


@pytest.mark.parametrize(
    ("source", "file"),
    [
        (LpipsVgg.HEADS, "lpips_heads/v0.1/vgg.pth"),
        (Vgg19Distance.SOURCE, "vgg19_normalised/vgg_normalised_conv3_1.pth"),
    ],
)
def test_hashes(source, file, shared_dir):
    digest = hashlib.sha256((shared_dir / "data" / "weights" / file).read_bytes()).hexdigest()
    assert f"(SHA-256 {digest})" in source


def test_every_message_has_an_address_and_a_hash(tmp_path):
    assert re.search(r"vgg16-([0-9a-f]{8})\.pth \(SHA-256 \1\.\.\.\)", LpipsVgg.SOURCE)
    missing = str(tmp_path / "none.pth")
    for error, run in (
        (CheckpointError, lambda: Vgg19Distance(missing)),
        (CheckpointError, lambda: LpipsVgg(missing, missing)),
        (CheckpointError, lambda: dino.load_dino(missing)),
        (ConfigError, lambda: make_perceptual("vgg19")),
        (ConfigError, lambda: make_perceptual("lpips-vgg")),
        (ConfigError, lambda: make_perceptual("lpips-vgg", vgg16=__file__)),
        (ConfigError, lambda: require_perceptual(1.0, None)),
    ):
        with pytest.raises((error, CheckpointError), match=r"https://.*SHA-256"):
            run()
