"""Training images by their global sample index, in a reproducible order.

Global sample g is place g % N of epoch g // N's permutation of the N images. Its crop and flip derive from (seed, g).
The data stream therefore does not depend on workers, processes, batch size or restarts.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from msdd_fast.errors import InputError
from msdd_fast.io.images import load_image, to_tensor
from msdd_fast.training.data.crop import CropConfig, crop_image
from msdd_fast.training.data.sources import ImageRef, ImageRefs
from msdd_fast.training.loop.draws import hash_seed

RETRIES = 100


class Sample(NamedTuple):
    """A training image, and the unreadable images (name, reason) that it replaces.

    Attributes:
        image: float32 (3, size, size) in [-1, 1].
        sample: its global sample index.
        unreadable: in the order in which they were tried.
    """

    image: Tensor
    sample: int
    unreadable: list[tuple[str, str]]


class ImageDataset(Dataset[Tensor]):
    """Augmented training images by global sample index: float32 (3, size, size) in [-1, 1].

    The next image in the epoch's order replaces an unreadable one, in the same way in every run.

    Args:
        refs: where the images are; kept in a few arrays, which the data-loading workers share.
        size: pixels per side.
        seed: of order, crops and flips.
        crop: how a square is cut out of an image.
    """

    def __init__(self, refs: Sequence[ImageRef], size: int, seed: int, crop: CropConfig | None = None) -> None:
        self.crop = CropConfig() if crop is None else crop
        self.refs = refs if isinstance(refs, ImageRefs) else ImageRefs(refs)
        self.size, self.seed = size, seed
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.refs)

    def fingerprint(self) -> dict[str, Any]:
        """How many images there are, and a hash of where they are, as plain data."""
        return {"images": len(self.refs), "sha256": self.refs.sha256()}

    def index_of(self, sample: int) -> int:
        """Index in ``refs`` of global sample ``sample``."""
        epoch, place = divmod(sample, len(self.refs))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(hash_seed(self.seed, epoch))
            self._order = torch.randperm(len(self.refs), generator=generator)
            self._epoch = epoch
        return int(self._order[place])

    def __getitem__(self, sample: int) -> Tensor:
        return self.sample(sample).image

    def __getitems__(self, samples: list[int]) -> list[Sample]:
        """All samples of a micro-batch, as a DataLoader asks for them."""
        return [self.sample(g) for g in samples]

    def sample(self, sample: int) -> Sample:
        """Global sample ``sample``. Raises InputError if RETRIES images in a row cannot be read."""
        start = sample - sample % len(self.refs)
        unreadable: list[tuple[str, str]] = []
        for k in range(min(RETRIES, len(self.refs))):
            ref = self.refs[self.index_of(start + (sample + k) % len(self.refs))]
            try:
                image = load_image(str(ref), ref.read())
            except (InputError, OSError) as e:
                unreadable.append((str(ref), str(e)))
                continue
            image = crop_image(image, self.size, self.crop, random.Random(hash_seed(self.seed, sample)))
            return Sample(to_tensor(image), sample, unreadable)
        raise InputError(f"{len(unreadable)} images in a row cannot be read, the last: {unreadable[-1][1]}")
