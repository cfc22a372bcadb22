"""Import paths of version 0.1: they still work, with a warning that names the new path."""

import importlib
import sys

import pytest

import msdd_fast
from msdd_fast._moved import MOVED


@pytest.mark.parametrize("old", sorted(MOVED))
def test_old_modules_warn_once_and_have_the_new_names(old):
    name = f"msdd_fast.{old}"
    sys.modules.pop(name, None)
    if not MOVED[old]:
        importlib.import_module(name)
        return
    with pytest.warns(DeprecationWarning, match=f"{name} has moved and will be gone in 0.3") as caught:
        module = importlib.import_module(name)
    for new in MOVED[old]:
        assert new in str(caught[0].message)
        there = importlib.import_module(f"msdd_fast.{new}")
        public = [n for n, value in vars(there).items() if getattr(value, "__module__", None) == there.__name__]
        public = [n for n in public if not n.startswith("_")]
        assert all(hasattr(module, n) for n in public)
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        _ = module.no_such_name


def test_code_of_version_0_1_runs(fresh):
    """What its README and guides imported, in a process of its own, with warnings as they are by default."""
    code = """
import msdd_fast
from msdd_fast.config import PRESETS, ScheduleConfig, SSDDConfig, TokenizerConfig, get_preset
from msdd_fast.images import center_crop, load_image, save_image, to_image, to_tensor, to_uint8
from msdd_fast.models.tokenizer import Tokenizer
from msdd_fast.models.mmdit import JointBlock
from msdd_fast.noise import start_noise
from msdd_fast.backends import use_backend
from msdd_fast.metrics import psnr, ssim, figures, Vgg19Distance
from msdd_fast.engine.program import StageImages
from msdd_fast.training.data import ImageDataset, find_images
assert Tokenizer is msdd_fast.Tokenizer and msdd_fast.config.PRESETS is PRESETS
"""
    done = fresh(code, check=True)
    assert "<string>:3: DeprecationWarning: msdd_fast.config has moved and will be gone in 0.3" in done.stderr


def test_unknown_names_stay_unknown():
    with pytest.raises(AttributeError, match="module 'msdd_fast' has no attribute 'pictures'"):
        _ = msdd_fast.pictures
    with pytest.raises(ModuleNotFoundError, match=r"msdd_fast\.pictures"):
        importlib.import_module("msdd_fast.pictures")
