"""Image quality figures."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter

from msdd_fast.errors import CheckpointError, InputError
from msdd_fast.io.images import to_tensor
from msdd_fast.metrics.image import psnr, ssim
from msdd_fast.metrics.vgg19 import Vgg19Distance

CHANNELS = {0: (3, 3, 1), 2: (3, 64, 3), 5: (64, 64, 3), 9: (64, 128, 3), 12: (128, 128, 3), 16: (128, 256, 3)}


@pytest.fixture(scope="module")
def photo():
    """A photograph as (1, 3, 64, 64)."""
    data = pytest.importorskip("skimage.data")
    return to_tensor(Image.fromarray(data.astronaut()).crop((160, 40, 288, 168)).resize((64, 64)))[None]


@pytest.fixture(scope="module")
def blurred(photo):
    """Increasingly blurred copies."""
    image = Image.fromarray(((photo[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())
    return [to_tensor(image.filter(ImageFilter.GaussianBlur(r)))[None] for r in (0.5, 1, 2, 4)]


@pytest.fixture(scope="module")
def weights(shared_dir):
    return shared_dir / "data" / "weights" / "vgg19_normalised" / "vgg_normalised_conv3_1.pth"


@pytest.fixture(scope="module")
def vgg(weights):
    return Vgg19Distance(weights)


# --- PSNR and SSIM


def test_psnr():
    x = torch.zeros(3, 3, 8, 8)
    y = torch.stack([torch.full((3, 8, 8), v) for v in (0.2, 2.0, 0.0)])
    y[2, 0, 0, 0] = 1.0
    # 10 log10(4 / mse): mse 0.04; 1 after clamping; 1/192.
    assert psnr(x, y).tolist() == pytest.approx([20.0, 6.0206, 10 * np.log10(4 * 192)], abs=1e-4)
    assert psnr(x, y).shape == (3,)
    assert psnr(x, x).isfinite().all() and (psnr(x, x) > 100).all()


def test_ssim(photo, blurred):
    metrics = pytest.importorskip("skimage.metrics")
    assert ssim(photo, photo).tolist() == [1.0]
    values = [float(ssim(photo, y)) for y in blurred]
    assert values == sorted(values, reverse=True) and 0 < values[-1] < values[0] < 1
    both = ssim(torch.cat([photo, photo]), torch.cat([blurred[0], blurred[2]]))
    assert both.tolist() == pytest.approx([values[0], values[2]])
    a, b = (((t[0] + 1) / 2).permute(1, 2, 0).numpy() for t in (photo, blurred[1]))
    assert values[1] == pytest.approx(metrics.structural_similarity(a, b, channel_axis=2, data_range=1.0), abs=1e-6)


def test_ssim_as_the_authors_compute_it(photo, blurred):
    metrics = pytest.importorskip("skimage.metrics")
    a, b = (((t[0] + 1) / 2).permute(1, 2, 0).numpy() for t in (photo, blurred[2]))
    expected = metrics.structural_similarity(a, b, channel_axis=2, data_range=2.0)
    inflated = float(ssim(photo, blurred[2], "ssim_authors"))
    assert inflated == pytest.approx(expected, abs=1e-6) and inflated > float(ssim(photo, blurred[2])) + 0.01
    with pytest.raises(InputError, match="variant must be one of ssim, ssim_authors, got 'x'"):
        ssim(photo, photo, "x")
    with pytest.raises(InputError, match="ssim needs sides of at least 7 pixels, got 6 x 64"):
        ssim(photo[:, :, :6], photo[:, :, :6])


def test_psnr_is_scikit_images(photo, blurred):
    metrics = pytest.importorskip("skimage.metrics")
    a, b = (((t[0] + 1) / 2).permute(1, 2, 0).numpy() for t in (photo, blurred[1]))
    expected = metrics.peak_signal_noise_ratio(a, b, data_range=1.0)
    assert float(psnr(photo, blurred[1])) == pytest.approx(expected, abs=1e-4)


def test_ssim_without_scikit_image(photo, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    with pytest.raises(InputError, match=r"ssim needs scikit-image: pip install 'msdd-fast\[eval\]'"):
        ssim(photo, photo)


@pytest.mark.parametrize("metric", [psnr, ssim])
@pytest.mark.parametrize(
    ("a", "b"), [((1, 3, 8, 8), (1, 3, 8, 9)), ((3, 8, 8), (3, 8, 8)), ((1, 1, 8, 8), (1, 1, 8, 8))]
)
def test_wrong_shapes(metric, a, b):
    with pytest.raises(InputError, match=r"images must be two tensors of one shape \(B, 3, H, W\), got \("):
        metric(torch.zeros(a), torch.zeros(b))


# --- VGG-19 distance


def test_vgg_distance(vgg, photo, blurred):
    assert vgg(photo, photo).tolist() == [0.0]
    values = [float(vgg(y, photo)) for y in blurred]
    assert values == sorted(values) and values[0] > 0
    assert float(vgg(photo, blurred[2])) == pytest.approx(values[2])
    both = vgg(torch.cat([blurred[0], blurred[3]]), torch.cat([photo, photo]))
    assert both.tolist() == pytest.approx([values[0], values[3]], rel=1e-4)


def test_vgg_gradient(vgg, photo, blurred):
    x = blurred[2].clone().requires_grad_()
    loss = vgg(x, photo).sum()
    loss.backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in vgg.parameters())
    better = x.detach() - 0.02 * x.grad / x.grad.abs().max()
    assert float(vgg(better, photo)) < float(loss.detach())


def test_vgg_file_is_the_genuine_network(vgg, weights, photo):
    """Layers, order, padding and pools as documented for the file, whose activations were scaled to mean 1."""
    state = torch.load(weights, weights_only=True)
    assert {k: tuple(v.shape) for k, v in state.items() if k.endswith("weight")} == {
        f"{k}.weight": (out, n_in, size, size) for k, (n_in, out, size) in CHANNELS.items()
    }
    # Key 0: RGB in [0, 1] to BGR * 255 - mean.
    swap = torch.zeros(3, 3)
    swap[0, 2] = swap[1, 1] = swap[2, 0] = 255
    assert torch.equal(state["0.weight"][:, :, 0, 0], swap)
    assert state["0.bias"].tolist() == pytest.approx([-103.939, -116.779, -123.68], abs=1e-3)

    x = F.conv2d((photo + 1) / 2, state["0.weight"], state["0.bias"])
    expected = []
    for key in (2, 5, 9, 12, 16):
        x = F.relu(F.conv2d(F.pad(x, (1, 1, 1, 1), "reflect"), state[f"{key}.weight"], state[f"{key}.bias"]))
        assert 0.3 < float(x.mean()) < 3, key
        if key in (2, 9, 16):
            expected.append(F.normalize(x, dim=1))
        if key in (5, 12):
            x = F.max_pool2d(x, 2)
    for actual, wanted in zip(vgg.features(photo), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


def random_state():
    state = {}
    for key, (n_in, out, size) in CHANNELS.items():
        state[f"{key}.weight"] = torch.randn(out, n_in, size, size) / n_in**0.5
        state[f"{key}.bias"] = torch.randn(out)
    return state


def test_vgg_wrong_files(tmp_path):
    path = tmp_path / "w.pth"
    with pytest.raises(
        CheckpointError, match=r"expected the VGG-19 features .*https://.*\(SHA-256 ff850617.*, got .*w\.pth"
    ):
        Vgg19Distance(path)
    path.write_text("hello")
    with pytest.raises(CheckpointError, match=r"w\.pth is damaged or not a PyTorch file"):
        Vgg19Distance(path)
    short = {k: v for k, v in random_state().items() if not k.startswith("16.")}
    wide = {**random_state(), "9.weight": torch.zeros(64, 64, 3, 3)}
    for data, message in (
        ([1, 2], r"expected 0\.weight of shape \(3, 3, 1, 1\), got nothing of the kind"),
        (torch.zeros(3), r"expected 0\.weight"),
        ({"epoch": 1, "model": {}}, r"expected 0\.weight"),
        (short, r"expected 16\.weight of shape \(256, 128, 3, 3\), got nothing"),
        (wide, r"expected 9\.weight of shape \(128, 64, 3, 3\), got \(64, 64, 3, 3\)"),
    ):
        torch.save(data, path)
        with pytest.raises(
            CheckpointError, match=rf"w\.pth is not the VGG-19 feature network up to relu3_1: {message}"
        ):
            Vgg19Distance(path)


def test_vgg_other_real_files(weights):
    for name in ("vgg_normalised_conv2_1.pth", "feature_invertor_conv3_1.pth"):
        with pytest.raises(CheckpointError, match=f"{name} is not the VGG-19 feature network"):
            Vgg19Distance(weights.parent / name)


def test_vgg_without_the_real_weights(tmp_path):
    """The wrapper's own properties need no genuine weights."""
    torch.save(random_state(), tmp_path / "w.pth")
    distance = Vgg19Distance(tmp_path / "w.pth")
    x = torch.rand(2, 3, 24, 16) * 2 - 1
    assert [f.shape for f in distance.features(x)] == [(2, 64, 24, 16), (2, 128, 12, 8), (2, 256, 6, 4)]
    assert distance(x, x).tolist() == [0, 0]
    assert (distance(x, -x) > 0).all()
    with pytest.raises(InputError, match="images must be two tensors"):
        distance(x, x[:1])
