"""LPIPS, FID and KID against the packages that define them, with random weights that the tests make."""

import contextlib
import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from msdd_fast.errors import CheckpointError, InputError
from msdd_fast.io.images import load_image, to_tensor
from msdd_fast.metrics.distances import frechet_distance, kernel_distance
from msdd_fast.metrics.features import InceptionFeatures, SqueezeNetFeatures, Vgg19Features
from msdd_fast.metrics.lpips import Lpips, LpipsVgg
from msdd_fast.metrics.statistics import FeatureStatistics
from msdd_fast.metrics.vgg19 import Vgg19Distance
from msdd_fast.ops._patches import to_uint8
from tests.metrics.packages import package, write_backbone, write_inception


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of 12 small pictures."""
    root = tmp_path_factory.mktemp("sets")
    rng = np.random.default_rng(0)
    for name, blocks in (("a", 8), ("b", 5)):
        (root / name).mkdir()
        for i in range(12):
            coarse = Image.fromarray(rng.integers(0, 256, (blocks, blocks, 3), dtype=np.uint8))
            coarse.resize((32, 32), Image.Resampling.BICUBIC).save(root / name / f"{i:02d}.png")
    return root / "a", root / "b"


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    write_inception(path)
    return path


def read(folder):
    return to_uint8(torch.stack([to_tensor(load_image(p)) for p in sorted(folder.iterdir())]))


def test_fid_and_kid_are_torch_fidelitys(folders, inception_file):
    """On the same two folders and the same network, through its own reading of files and its own statistics."""
    fidelity = package("torch_fidelity", "torch-fidelity")
    expected = fidelity.calculate_metrics(
        input1=str(folders[0]),
        input2=str(folders[1]),
        cuda=False,
        fid=True,
        kid=True,
        kid_subset_size=12,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(inception_file),
        feature_layer_fid="64",
        feature_layer_kid="64",
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    network = InceptionFeatures(inception_file, "64")
    assert (network.frechet, network.kid, network.width) == ("frechet_inception_64", "kid_inception_64", 64)
    features = [torch.cat([network(x) for x in read(f).split(10)]) for f in folders]
    statistics = [FeatureStatistics(64) for _ in folders]
    for s, f in zip(statistics, features, strict=True):
        for part in f.split(7):
            s.update(part)
    fid = frechet_distance(*statistics)
    assert fid > 1e-3
    assert fid == pytest.approx(expected["frechet_inception_distance"], rel=1e-6, abs=1e-6)
    kid = kernel_distance(*features)
    assert kid.mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-6, abs=1e-6)
    assert kid.std == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-6, abs=1e-6)
    # A set that differs in one picture of 12 has another distance.
    other = FeatureStatistics(64)
    other.update(torch.cat([features[1][:11], features[0][:1]]))
    assert abs(frechet_distance(statistics[0], other) - fid) > 1e-4 * fid


def test_only_the_last_layer_is_called_fid(inception_file):
    last = InceptionFeatures(inception_file)
    assert (last.frechet, last.kid, last.width) == ("fid", "kid", 2048)
    images = torch.zeros(1, 3, 20, 24, dtype=torch.uint8)
    assert last(images).shape == (1, 2048)
    for bad in (images.float(), images[0], images[:, :1]):
        with pytest.raises(InputError, match=r"images must be uint8 \(B, 3, H, W\), got"):
            last(bad)
    with pytest.raises(InputError, match="layer must be one of 64, 192, 768, 2048, got '100'"):
        InceptionFeatures(inception_file, "100")


class Gadget:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_inception_files_that_are_none(tmp_path, inception_file):
    path = tmp_path / "w.pth"
    with pytest.raises(CheckpointError, match=r"InceptionV3 weights not found: expected torch-fidelity's .*w\.pth"):
        InceptionFeatures(path)
    torch.save({"fc.weight": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match=r"w\.pth is not torch-fidelity's InceptionV3"):
        InceptionFeatures(path)
    # torch-fidelity would run what is in it.
    torch.save({"a": Gadget(tmp_path / "ran")}, path)
    with pytest.raises(CheckpointError):
        InceptionFeatures(path)
    assert not (tmp_path / "ran").exists()


# --- LPIPS


def image_pair():
    return torch.rand(2, 2, 3, 64, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_lpips_alex_is_the_packages(tmp_path):
    """The package's own model, to which the same backbone is given; its heads are the bundled ones in both."""
    lpips = package("lpips", "lpips")
    state = write_backbone(tmp_path / "backbone.pth", "alex")
    torch.manual_seed(5)  # what is not loaded from the file would differ
    ours = Lpips("alex", tmp_path / "backbone.pth")
    with contextlib.redirect_stdout(io.StringIO()), pytest.warns(UserWarning):
        theirs = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    for part in theirs.net.children():
        part.load_state_dict({k: state[f"features.{k}"] for k in part.state_dict()})
    x, y = image_pair()
    with torch.no_grad():
        expected = theirs(x, y).flatten()
    assert ours(x, y).tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert (expected > 0.01).all() and abs(float(expected[0] - expected[1])) > 1e-4
    assert ours(x, x).tolist() == [0, 0]
    moved = x.clone().requires_grad_()
    ours(moved, y).sum().backward()
    assert moved.grad.isfinite().all() and moved.grad.abs().sum() > 0
    assert all(not p.requires_grad for p in ours.parameters())


def test_lpips_vgg_is_the_packages(tmp_path):
    """The package's model with the file's backbone, and the one for training, which needs no package, agree."""
    lpips = package("lpips", "lpips")
    state = write_backbone(tmp_path / "backbone.pth", "vgg")
    ours = Lpips("vgg", tmp_path / "backbone.pth")
    parts = {f"features.{k}": v for part in ours.lpips.net.children() for k, v in part.state_dict().items()}
    assert isinstance(ours.lpips, lpips.LPIPS) and parts.keys() == state.keys()
    assert all(torch.equal(parts[k], state[k]) for k in state)
    plain = LpipsVgg(tmp_path / "backbone.pth", f"{next(iter(lpips.__path__))}/weights/v0.1/vgg.pth")
    x, y = image_pair()
    expected = ours.lpips(x, y).flatten().tolist()
    assert ours(x, y).tolist() == expected and min(expected) > 0.01
    assert plain(x, y).tolist() == pytest.approx(expected, rel=1e-5)


def test_lpips_files_that_are_none(tmp_path):
    path = tmp_path / "w.pth"
    with pytest.raises(CheckpointError, match=r"LPIPS weights not found: expected torchvision's AlexNet, https://"):
        Lpips("alex", path)
    with pytest.raises(InputError, match="network must be vgg or alex, got 'squeeze'"):
        Lpips("squeeze", path)
    package("lpips", "lpips")
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, path)
    with pytest.raises(CheckpointError, match=r"w\.pth is not torchvision's AlexNet, .*expected features\.0\.weight"):
        Lpips("alex", path)


# --- other networks: their figures bear their names


def test_vgg19_features(tmp_path, shared_dir):
    weights = shared_dir / "data/weights/vgg19_normalised/vgg_normalised_conv3_1.pth"
    network = Vgg19Features(weights)
    assert (network.frechet, network.kid, network.width) == ("frechet_vgg19", "kid_vgg19", 256)
    images = torch.randint(0, 256, (2, 3, 40, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    x = images.float() / 127.5 - 1
    maps = Vgg19Distance(weights)
    torch.testing.assert_close(network(images), maps.activations(x)[2].mean(dim=(2, 3)))
    for unit, raw in zip(maps.features(x), maps.activations(x), strict=True):
        torch.testing.assert_close(unit, F.normalize(raw, dim=1, eps=1e-6))


def test_squeezenet_features(tmp_path):
    """Against torchvision's module without padding, fed as Caffe's network is."""
    models = package("torchvision.models", "torchvision")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        features = models.SqueezeNet("1_1", num_classes=1).features.eval()
    torch.save({f"features.{k}": v for k, v in features.state_dict().items()}, tmp_path / "w.pth")
    network = SqueezeNetFeatures(tmp_path / "w.pth")
    assert (network.frechet, network.kid, network.width) == ("frechet_squeezenet", "kid_squeezenet", 512)
    images = torch.randint(0, 256, (2, 3, 64, 80), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    bgr = images.flip(1).float() - torch.tensor([104.0, 117.0, 123.0]).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(network(images), features(bgr).mean(dim=(2, 3)))
    with pytest.raises(CheckpointError, match=r"SqueezeNet features not found"):
        SqueezeNetFeatures(tmp_path / "no.pth")


def test_the_real_squeezenet(shared_dir):
    network = SqueezeNetFeatures(shared_dir / "data/weights/squeezenet/squeezenet1_1_caffe_features.pth")
    out = network(torch.full((1, 3, 64, 64), 128, dtype=torch.uint8))
    assert out.shape == (1, 512) and out.isfinite().all() and (out > 0).any()
