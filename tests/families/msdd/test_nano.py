"""The bundled checkpoints: size, loading time, and that they reconstruct."""

import subprocess
import sys

import pytest
import torch
from PIL import Image

from msdd_fast import Tokenizer
from msdd_fast.bench.quality import mean_colour, stage0
from msdd_fast.checkpoint import ASSETS, bundled_names
from msdd_fast.commands.common import load_batch
from msdd_fast.families import get_preset
from msdd_fast.io.images import center_crop, find_image_files, to_tensor
from msdd_fast.metrics.image import psnr

SIZES = {"msdd-nano": 128, "msdd-nano-256": 256}


@pytest.fixture(scope="module", params=list(SIZES))
def nano(request):
    return Tokenizer.from_pretrained(request.param)


def gains(nano, x):
    """PSNR over the mean colour and over the enlarged stage-0 estimate, in dB."""
    z = nano.encode(x)
    y = nano.decode(z)
    result = psnr(y, x).mean()
    return result - psnr(mean_colour(x), x).mean(), result - psnr(stage0(nano, z, 0), x).mean()


def test_files():
    assert sorted(SIZES) == bundled_names()
    sizes = [f.stat().st_size for f in ASSETS.rglob("*") if f.is_file()]
    assert max(sizes) < 20e6 and sum(sizes) <= 40e6
    for name in SIZES:
        assert (ASSETS / name / "README.md").exists() and (ASSETS / name / "train.json").exists()


def test_parameters_and_latents(nano):
    assert sum(p.numel() for p in nano.parameters()) <= 12_000_000
    size = nano.config.image_size
    assert nano.encode(torch.zeros(1, 3, size, size)).shape == (1, 128, 32)
    assert nano.config.decoder.conditioning == "cross" and len(nano.schedule) == 4


@pytest.mark.parametrize(("name", "size"), SIZES.items())
def test_config_is_the_presets(name, size):
    config = Tokenizer.from_pretrained(name).config
    assert config.image_size == size and config.stage_resolution(0) == size // 8
    assert config == get_preset(name)


def test_loads_in_under_two_seconds():
    """Of the processor, in a fresh process, imports not counted."""
    code = (
        "import time; from msdd_fast import Tokenizer; t = time.process_time();"
        "Tokenizer.from_pretrained('msdd-nano-256'); print(time.process_time() - t)"
    )
    seconds = float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert seconds < 2.0


def test_bundled_photographs(nano):
    """The demo's pictures, which need no reference data."""
    data = pytest.importorskip("skimage.data", reason="needs scikit-image's photographs")
    names, size = ("astronaut", "chelsea", "coffee", "rocket"), nano.config.image_size
    x = torch.stack([to_tensor(center_crop(Image.fromarray(getattr(data, n)()), size)) for n in names])
    over_mean, over_stage0 = gains(nano, x)
    assert over_mean > 3 and over_stage0 > 1


def test_kodak(nano, shared_dir):
    x = load_batch(find_image_files(shared_dir / "data/eval256/kodak24"), nano.config.image_size)
    over_mean, over_stage0 = gains(nano, x)
    assert over_mean >= 3 and over_stage0 >= 1
