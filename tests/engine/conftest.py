"""Small models of both kinds for the engine's tests, and the devices that they run on."""

from dataclasses import replace

import pytest

from msdd_fast.diffusion.config import ScheduleConfig
from msdd_fast.families import get_preset
from msdd_fast.families.msdd.config import authors_choices
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
