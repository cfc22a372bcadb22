"""The packages of the extra [eval], and weights for them that nobody trained."""

import io

import pytest
import torch

from msdd_fast.errors import InputError
from msdd_fast.io.packages import import_package
from msdd_fast.metrics.features import SqueezeNetFeatures


def package(module, name):
    """The module; skips the test where the package is not installed."""
    try:
        return import_package(module, name, "eval")
    except InputError as e:
        pytest.skip(str(e))


def write_inception(path, seed=0):
    """A random InceptionV3 as torch-fidelity stores it."""
    module = package("torch_fidelity.feature_extractor_inceptionv3", "torch-fidelity")

    class Unloaded(module.FeatureExtractorInceptionV3):
        def load_state_dict(self, *args, **kwargs):
            return None

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = Unloaded("random", ["64"], feature_extractor_weights_path=nothing)
        for name, buffer in network.named_buffers():
            if name.endswith("running_var"):
                buffer.fill_(0.15)  # keeps activations from fading away over the layers
    torch.save(network.state_dict(), path)


def write_backbone(path, network, seed=0):
    """Random features of torchvision's VGG-16 or AlexNet, under its names. Returns the state dict."""
    models = package("torchvision.models", "torchvision")
    layers = models.vgg.cfgs["D"] if network == "vgg" else None
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # The classifier, most of the weights, is not part of it.
        features = models.vgg.make_layers(layers) if layers else models.AlexNet(num_classes=1).features
        for parameter in features.parameters():
            parameter.data.mul_(1.5)
    state = {f"features.{name}": value for name, value in features.state_dict().items()}
    torch.save(state, path)
    return state


def write_squeezenet(path, seed=0):
    """Random SqueezeNet features as the file has them."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"0": (64, 3, 3)}
    for i, (n_in, squeezed, expanded) in SqueezeNetFeatures._FIRES.items():
        shapes[f"{i}.squeeze"] = (squeezed, n_in, 1)
        shapes |= {f"{i}.expand{k}x{k}": (expanded, squeezed, k) for k in (1, 3)}
    state = {}
    for name, (n_out, n_in, k) in shapes.items():
        weight = torch.randn(n_out, n_in, k, k, generator=generator) * (2 / (n_in * k**2)) ** 0.5
        state |= {f"features.{name}.weight": weight, f"features.{name}.bias": torch.zeros(n_out)}
    torch.save(state, path)
