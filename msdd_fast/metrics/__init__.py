"""Image quality. A metric is named after the network that it really uses."""

from msdd_fast.metrics.image import figures, psnr, ssim
from msdd_fast.metrics.vgg19 import Vgg19Distance

__all__ = ["Vgg19Distance", "figures", "psnr", "ssim"]
