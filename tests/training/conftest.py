"""Pictures to train on."""

import pytest
from PIL import Image


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Smooth two-colour pictures: easy to learn."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(6):
        image = Image.linear_gradient("L").rotate(60 * i).resize((80, 72))
        Image.merge("RGB", (image, image, Image.new("L", image.size, 40 * i))).save(folder / f"{i}.png")
    return folder
