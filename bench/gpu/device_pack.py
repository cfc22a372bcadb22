"""Pack reference data for a machine that cannot see shared/: fixtures, and training pictures made smaller.

    python -m msdd_fast.bench.gpu.device_pack SHARED OUT

Writes OUT/fixtures/*.safetensors (copies) and OUT/train.tar (every picture of SHARED/data/train256-*.tar as WebP,
at the best quality that keeps the tar within ``TRAIN_BYTES``). Together under 64 MiB, what one call may carry.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import tarfile
from pathlib import Path

from PIL import Image

from msdd_fast.errors import InputError
from msdd_fast.training.data import ImageRef, find_images

TRAIN_BYTES = 24_000_000
TOTAL_BYTES = 64 * 2**20
_TAR_OVERHEAD = 1024  # header and padding of one small file
QUALITIES = (80, 70, 60, 50, 40, 30, 20, 10)


def encode(ref: ImageRef, quality: int) -> bytes:
    """One picture as WebP."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(ref.read())).convert("RGB").save(buffer, format="WEBP", quality=quality, method=4)
    return buffer.getvalue()


def choose_quality(refs: list[ImageRef], limit: int) -> int:
    """Best quality at which a sample of 60 pictures predicts a tar of at most 95 % of ``limit`` bytes."""
    sample = refs[:: max(1, len(refs) // 60)]
    for quality in QUALITIES:
        mean = sum(len(encode(r, quality)) + _TAR_OVERHEAD for r in sample) / len(sample)
        if mean * len(refs) <= 0.95 * limit:
            return quality
    raise InputError(f"limit must leave room for {len(refs)} pictures, got {limit} bytes")


def write_train_tar(refs: list[ImageRef], path: Path, limit: int = TRAIN_BYTES) -> int:
    """Write the tar atomically; returns the WebP quality. Raises InputError if it came out too large."""
    quality = choose_quality(refs, limit)
    temporary = path.with_suffix(".tmp")
    with tarfile.open(temporary, "w") as tar:
        for i, ref in enumerate(refs):
            data = encode(ref, quality)
            info = tarfile.TarInfo(f"{i:06d}.webp")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    if temporary.stat().st_size > limit:
        temporary.unlink()
        raise InputError(f"the training pack must be at most {limit} bytes; quality {quality} was not enough")
    os.replace(temporary, path)
    return quality


def pack(shared: Path, out: Path) -> None:
    """Fill ``out``. Raises InputError if ``shared`` has no training shards or the whole is too large to carry."""
    shards = sorted((shared / "data").glob("train256-*.tar"))
    if not shards:
        raise InputError(f"SHARED must hold data/train256-*.tar, got {shared}")
    (out / "fixtures").mkdir(parents=True, exist_ok=True)
    for fixture in sorted((shared / "fixtures").iterdir()):
        shutil.copyfile(fixture, out / "fixtures" / fixture.name)
    refs = find_images(shards)
    quality = write_train_tar(refs, out / "train.tar")
    total = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    print(f"{out}: {len(refs)} training pictures as WebP quality {quality}, {total / 1e6:.1f} MB in all")
    if total > TOTAL_BYTES:
        raise InputError(f"the pack must be at most {TOTAL_BYTES} bytes to travel in one call, got {total}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    pack(args.shared, args.out)


if __name__ == "__main__":
    main()
