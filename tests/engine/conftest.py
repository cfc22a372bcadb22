"""Small models of both kinds for the engine's tests, and the devices that they run on."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from msdd_fast.diffusion.config import ScheduleConfig
from msdd_fast.families.msdd.config import authors_choices
from msdd_fast.families.presets import get_preset
from tests.conftest import HAS_GPU
from tests.perturbed import perturbed


def _configs():
    tiny = get_preset("tiny")
    joint = replace(tiny, decoder=replace(tiny.decoder, conditioning="joint"))
    authors = authors_choices(replace(tiny, image_size=32, schedule=ScheduleConfig(num_stages=3)))
    return {"cross": tiny, "joint": joint, "authors-3scale": authors}


@pytest.fixture(scope="session", params=["cross", "joint", "authors-3scale"])
def tok(request):
    """A perturbed tiny tokenizer of each kind; not to be changed."""
    return perturbed(_configs()[request.param])


@pytest.fixture(scope="session")
def cross():
    """The tiny preset."""
    return perturbed("tiny")


GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")])


@pytest.fixture(params=["cpu", GPU])
def on_device(request, monkeypatch):
    """Brings tokenizers (a copy) and tensors to the device under test; float32 convolutions are float32's there."""
    if request.param == "cpu":
        return lambda x: x
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return lambda x: x.cuda() if isinstance(x, Tensor) else copy.deepcopy(x).cuda()
