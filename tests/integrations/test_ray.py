"""The callable classes of ``map_batches``, called as Ray calls them; none of this needs Ray."""

import numpy as np
import pytest
import torch

import msdd_fast
from msdd_fast.errors import InputError
from msdd_fast.integrations.ray import Decoder, Encoder
from tests.perturbed import perturbed

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tiny():
    return perturbed()


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("ray") / "tiny"
    tiny.save_pretrained(path)
    return path


def test_rows_get_images_by_their_index(tiny, checkpoint):
    z = torch.randn(5, *tiny.config.latent_shape, generator=torch.Generator().manual_seed(0)).numpy()
    z.flags.writeable = False  # as Ray's are
    index = np.array([7, 3, 100, 0, 8])
    rows = Decoder(checkpoint, batch_size=2, seed=10)(
        {"latents": z, "index": index, "caption": np.array(list("abcde"))}
    )
    assert set(rows) == {"image", "index", "caption"} and rows["image"].dtype == np.uint8
    engine = msdd_fast.accelerate(tiny, batch_sizes=(1,))
    for i in range(5):
        expected = engine.decode(torch.from_numpy(z[i : i + 1].copy()), 10 + int(index[i]), out_dtype=torch.uint8)[0]
        assert np.abs(rows["image"][i].astype(int) - expected.permute(1, 2, 0).numpy()).max() <= 1
    # A column of objects, which Ray makes of arrays that it cannot stack, is the same rows.
    column = np.empty(5, dtype=object)
    column[:] = list(z)
    again = Decoder(checkpoint, batch_size=2, seed=10)({"latents": column, "index": index})
    assert (again["image"] == rows["image"]).all()


def test_rows_get_latents(tiny, checkpoint):
    size = tiny.config.image_size
    images = np.random.default_rng(0).integers(0, 256, (3, size, size, 3), dtype=np.uint8)
    rows = Encoder(checkpoint, batch_size=2)({"image": images, "index": np.arange(3)})
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    torch.testing.assert_close(torch.from_numpy(rows["latents"]), tiny.encode(x), atol=1e-5, rtol=1e-5)
    assert set(rows) == {"latents", "index"}


def test_rows_that_cannot_be_used(tiny, checkpoint):
    decoder, encoder = Decoder(checkpoint, batch_size=2), Encoder(checkpoint)
    z = np.zeros((2, *tiny.config.latent_shape), np.float32)
    for rows, says in (
        ({"index": np.arange(2)}, "must have a column 'latents', got index"),
        ({"latents": z}, "must have a column 'index', got latents"),
        ({"latents": z[:, :1], "index": np.arange(2)}, "z must have shape"),
        ({"latents": z + np.nan, "index": np.arange(2)}, "latents must be finite"),
        ({"latents": z, "index": np.array([-1, 0])}, "seed must be"),
    ):
        with pytest.raises(InputError, match=says):
            decoder(rows)
    mixed = np.empty(2, dtype=object)
    mixed[:] = [z[0], z[0, :1]]
    with pytest.raises(InputError, match="one shape in a batch"):
        decoder({"latents": mixed, "index": np.arange(2)})
    for images in (np.zeros((1, 8, 8), np.uint8), np.zeros((1, 8, 8, 3), np.float32)):
        with pytest.raises(InputError, match="image must be uint8"):
            encoder({"image": images})
    for options in ({"batch_size": 0}, {"seed": -1}, {"threads": 0}):
        with pytest.raises(InputError, match=next(iter(options))):
            Decoder(checkpoint, **options)
