"""Training images: folders, tar shards, pipes."""

from msdd_fast.training.data.crop import CropConfig
from msdd_fast.training.data.dataset import ImageDataset
from msdd_fast.training.data.sources import ImageRef, find_images

__all__ = ["CropConfig", "ImageDataset", "ImageRef", "find_images"]
