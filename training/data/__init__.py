"""Training images: folders, tar shards, pipes."""

from msdd_fast.training.data.dataset import CropConfig, ImageDataset, find_images

__all__ = ["CropConfig", "ImageDataset", "find_images"]
