"""Pictures to train on."""

import logging

import pytest
from PIL import Image

# torch.distributed.checkpoint logs several lines per tensor, which pytest would keep.
logging.getLogger("c10d-NullHandler-dcp_logger").setLevel(logging.WARNING)


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Smooth two-colour pictures: easy to learn."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(6):
        image = Image.linear_gradient("L").rotate(60 * i).resize((80, 72))
        Image.merge("RGB", (image, image, Image.new("L", image.size, 40 * i))).save(folder / f"{i}.png")
    return folder
