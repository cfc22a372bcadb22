"""The bundled checkpoint: size, loading time, and that it reconstructs."""

import subprocess
import sys

import pytest
import torch
from PIL import Image

from msdd_fast import Tokenizer
from msdd_fast.bench.quality import mean_colour, stage0
from msdd_fast.checkpoint import ASSETS
from msdd_fast.commands.common import load_batch
from msdd_fast.io.images import center_crop, find_image_files, to_tensor
from msdd_fast.metrics.image import psnr

DIRECTORY = ASSETS / "msdd-nano"


@pytest.fixture(scope="module")
def nano():
    return Tokenizer.from_pretrained("msdd-nano")


def gains(nano, x):
    """PSNR over the mean colour and over the enlarged stage-0 estimate, in dB."""
    z = nano.encode(x)
    y = nano.decode(z)
    result = psnr(y, x).mean()
    return result - psnr(mean_colour(x), x).mean(), result - psnr(stage0(nano, z, 0), x).mean()


def test_size():
    files = list(DIRECTORY.glob("*.safetensors"))
    sizes = [f.stat().st_size for f in files]
    assert files and max(sizes) < 15e6 and sum(sizes) <= 20e6
    assert (DIRECTORY / "README.md").exists()


def test_parameters_and_latents(nano):
    assert sum(p.numel() for p in nano.parameters()) <= 10_000_000
    assert nano.encode(torch.zeros(1, 3, 128, 128)).shape == (1, 128, 32)
    assert nano.config.decoder.conditioning == "cross" and len(nano.schedule) == 4


def test_loads_in_under_two_seconds():
    """Of the processor, in a fresh process, imports not counted."""
    code = (
        "import time; from msdd_fast import Tokenizer; t = time.process_time(); Tokenizer.from_pretrained('msdd-nano');"
        "print(time.process_time() - t)"
    )
    seconds = float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert seconds < 2.0


def test_bundled_photographs():
    """The demo's pictures, which need no reference data."""
    data = pytest.importorskip("skimage.data", reason="needs scikit-image's photographs")
    nano = Tokenizer.from_pretrained("msdd-nano")
    names = ("astronaut", "chelsea", "coffee", "rocket")
    x = torch.stack([to_tensor(center_crop(Image.fromarray(getattr(data, n)()), 128)) for n in names])
    over_mean, over_stage0 = gains(nano, x)
    assert over_mean > 3 and over_stage0 > 1


def test_kodak(nano, shared_dir):
    x = load_batch(find_image_files(shared_dir / "data/eval256/kodak24"), 128)
    over_mean, over_stage0 = gains(nano, x)
    assert over_mean >= 3 and over_stage0 >= 1
