"""Perceptual losses by name, and LPIPS from local files."""

import logging

import pytest
import torch
import torch.nn.functional as F

from msdd_fast.errors import CheckpointError, ConfigError, InputError
from msdd_fast.metrics.lpips import LpipsVgg
from msdd_fast.metrics.vgg19 import Vgg19Distance
from msdd_fast.training.losses.perceptual import make_perceptual

# torchvision's VGG-16: (index in `features`, channels); M is a 2x2 max-pool.
VGG16 = (
    *((0, 64), (2, 64), "M", (5, 128), (7, 128), "M", (10, 256), (12, 256), (14, 256), "M"),
    *((17, 512), (19, 512), (21, 512), "M", (24, 512), (26, 512), (28, 512)),
)
TAPS = (2, 7, 14, 21, 28)


@pytest.fixture(scope="module")
def trunk():
    generator = torch.Generator().manual_seed(0)
    state, n_in = {}, 3
    for layer in VGG16:
        if layer != "M":
            index, n_out = layer
            state[f"features.{index}.weight"] = torch.randn(n_out, n_in, 3, 3, generator=generator) / (4 * n_in) ** 0.5
            state[f"features.{index}.bias"] = torch.randn(n_out, generator=generator) * 0.1
            n_in = n_out
    return {**state, "classifier.0.weight": torch.zeros(1, 1)}


@pytest.fixture(scope="module")
def heads():
    generator = torch.Generator().manual_seed(1)
    widths = (64, 128, 256, 512, 512)
    return {f"lin{i}.model.1.weight": torch.rand(1, w, 1, 1, generator=generator) for i, w in enumerate(widths)}


@pytest.fixture(scope="module")
def files(trunk, heads, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lpips")
    torch.save(trunk, folder / "vgg16.pth")
    torch.save(heads, folder / "vgg.pth")
    return str(folder / "vgg16.pth"), str(folder / "vgg.pth")


def by_hand(trunk, heads, x, y):
    total = 0.0
    maps = []
    for image in (x, y):
        h = (image - torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)) / torch.tensor([0.458, 0.448, 0.450]).view(
            3, 1, 1
        )
        seen = []
        for layer in VGG16:
            if layer == "M":
                h = F.max_pool2d(h, 2)
                continue
            index = layer[0]
            h = F.conv2d(h, trunk[f"features.{index}.weight"], trunk[f"features.{index}.bias"], padding=1).relu()
            if index in TAPS:
                seen.append(h / h.norm(dim=1, keepdim=True))
        maps.append(seen)
    for i, (a, b) in enumerate(zip(*maps, strict=True)):
        total = total + F.conv2d((a - b) ** 2, heads[f"lin{i}.model.1.weight"]).mean(dim=(1, 2, 3))
    return total


def test_lpips_by_hand(trunk, heads, files):
    distance = LpipsVgg(*files)
    x, y = (torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(s)) * 2 - 1 for s in (2, 3))
    torch.testing.assert_close(distance(x, y), by_hand(trunk, heads, x, y), rtol=1e-4, atol=1e-5)
    assert distance(x, x).tolist() == [0, 0]
    x.requires_grad_()
    distance(x, x * 0).sum().backward()
    assert x.grad.isfinite().all() and float(x.grad.abs().sum()) > 0
    assert not any(p.requires_grad for p in distance.parameters())
    with pytest.raises(InputError, match="images must be two tensors of one shape"):
        distance(x, y[:1])


def test_lpips_is_finite_where_features_vanish(trunk, heads, tmp_path):
    dead = {k: v * 0 for k, v in trunk.items()}
    torch.save(dead, tmp_path / "vgg16.pth")
    torch.save(heads, tmp_path / "vgg.pth")
    x = torch.zeros(1, 3, 16, 16, requires_grad=True)
    LpipsVgg(tmp_path / "vgg16.pth", tmp_path / "vgg.pth")(x, x.detach() + 1).sum().backward()
    assert x.grad.isfinite().all()


def test_the_real_heads(shared_dir, files):
    heads = shared_dir / "data/weights/lpips_heads/v0.1"
    LpipsVgg(files[0], heads / "vgg.pth")
    with pytest.raises(
        CheckpointError, match=r"alex\.pth is not LPIPS v0\.1's heads.*: expected lin1\..*, got \(1, 192"
    ):
        LpipsVgg(files[0], heads / "alex.pth")


def test_wrong_lpips_files(files, tmp_path):
    with pytest.raises(
        CheckpointError, match=r"LPIPS weights not found: expected torchvision's VGG-16, .*got .*no\.pth"
    ):
        LpipsVgg(tmp_path / "no.pth", files[1])
    with pytest.raises(CheckpointError, match=r"vgg\.pth is not torchvision's VGG-16, .*expected features\.0\.weight"):
        LpipsVgg(files[1], files[1])


def test_each_is_named_after_its_network(files, shared_dir, caplog):
    vgg19 = str(shared_dir / "data/weights/vgg19_normalised/vgg_normalised_conv3_1.pth")
    x = torch.rand(2, 3, 32, 32)
    with caplog.at_level(logging.WARNING):
        made = [
            make_perceptual("vgg19", vgg19=vgg19),
            make_perceptual("lpips-vgg", vgg16=files[0], lpips_heads=files[1]),
        ]
        assert not caplog.records
        made.append(make_perceptual("random"))
        assert "an untrained network, for tests only" in caplog.text
    assert [p.name for p in made] == ["vgg19_distance", "lpips_vgg", "random_distance"]
    assert all(p(x, x).tolist() == [0, 0] and (p(x, -x) > 0).all() for p in made)


def test_a_file_that_is_not_named(files):
    with pytest.raises(ConfigError, match="perceptual 'vgg19' needs the file vgg19, got none: the VGG-19 features"):
        make_perceptual("vgg19")
    with pytest.raises(
        ConfigError, match="perceptual 'lpips-vgg' needs the file vgg16, got none: torchvision's VGG-16"
    ):
        make_perceptual("lpips-vgg", lpips_heads=files[1])
    with pytest.raises(ConfigError, match=r"needs the file lpips_heads, got none: LPIPS v0\.1's heads"):
        make_perceptual("lpips-vgg", vgg16=files[0])


@pytest.mark.parametrize("direct", [True, False])
def test_autocast_changes_no_distance(files, tmp_path, direct):
    """Small distances are differences of nearly equal features, which bfloat16 cannot hold."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, n_in, n_out, kernel in Vgg19Distance._LAYERS:
        state[f"{key}.weight"] = torch.randn(n_out, n_in, kernel, kernel, generator=generator) / (n_in * kernel) ** 0.5
        state[f"{key}.bias"] = torch.zeros(n_out)
    torch.save(state, tmp_path / "vgg19.pth")
    losses = [
        make_perceptual("vgg19", vgg19=str(tmp_path / "vgg19.pth")),
        make_perceptual("lpips-vgg", vgg16=files[0], lpips_heads=files[1]),
        make_perceptual("random"),
    ]
    y = torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1
    x = (y + 0.01 * torch.randn(y.shape, generator=generator)).requires_grad_()
    for loss in losses:
        distance = loss.distance if direct and loss.name != "random_distance" else loss
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = distance(x, y)
        exact = distance(x, y)
        assert torch.equal(rounded, exact) and rounded.dtype == torch.float32
        (a,), (b,) = (torch.autograd.grad(d.sum(), x) for d in (rounded, exact))
        assert torch.equal(a, b)
