"""Image quality. A metric is named after the network that it really uses."""

from msdd_fast.metrics.image import psnr, ssim

__all__ = ["psnr", "ssim"]
