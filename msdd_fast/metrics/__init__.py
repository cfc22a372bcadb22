"""Image quality. A metric is named after the network that it really uses."""

from msdd_fast.metrics.distances import KernelDistance, frechet_distance, kernel_distance
from msdd_fast.metrics.features import InceptionFeatures, SqueezeNetFeatures, Vgg19Features
from msdd_fast.metrics.image import figures, psnr, ssim
from msdd_fast.metrics.lpips import Lpips, LpipsVgg
from msdd_fast.metrics.statistics import FeatureStatistics
from msdd_fast.metrics.vgg19 import Vgg19Distance

__all__ = [
    "FeatureStatistics",
    "InceptionFeatures",
    "KernelDistance",
    "Lpips",
    "LpipsVgg",
    "SqueezeNetFeatures",
    "Vgg19Distance",
    "Vgg19Features",
    "figures",
    "frechet_distance",
    "kernel_distance",
    "psnr",
    "ssim",
]
