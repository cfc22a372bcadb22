"""Pack reference data for a GPU machine that cannot see this one's files: fixtures, and training images made smaller.

    python tools/device_pack.py SHARED OUT [--train-mb 24] [--total-mb 67]

Writes OUT/fixtures/ (copies) and OUT/train.tar: every image of SHARED/data/train256-*.tar as WebP, at the best quality
that keeps the tar within ``--train-mb``. Fails if everything together exceeds ``--total-mb``.
"""

from __future__ import annotations

import argparse
import io
import shutil
import sys
import tarfile
from pathlib import Path

from msdd_fast.errors import InputError
from msdd_fast.io.files import atomic_write
from msdd_fast.io.images import load_image
from msdd_fast.io.program import run_program
from msdd_fast.training.data import ImageRef, find_images

TRAIN_MB, TOTAL_MB = 24.0, 67.0
QUALITIES = (80, 70, 60, 50, 40, 30, 20, 10)
_TAR_OVERHEAD = 1024  # header and padding of one small file


def encode(ref: ImageRef, quality: int) -> bytes:
    """One image as WebP."""
    buffer = io.BytesIO()
    load_image(str(ref), ref.read()).save(buffer, format="WEBP", quality=quality, method=4)
    return buffer.getvalue()


def choose_quality(refs: list[ImageRef], limit: float) -> int:
    """Best quality at which a sample of 60 images predicts a tar of at most 95 % of ``limit`` bytes."""
    sample = refs[:: max(1, len(refs) // 60)]
    for quality in QUALITIES:
        mean = sum(len(encode(r, quality)) + _TAR_OVERHEAD for r in sample) / len(sample)
        if mean * len(refs) <= 0.95 * limit:
            return quality
    raise InputError(f"limit must leave room for {len(refs)} images, got {limit:.0f} bytes")


def write_train_tar(refs: list[ImageRef], path: Path, limit: float) -> int:
    """Write the tar atomically; returns the WebP quality. Raises InputError if it exceeds ``limit`` bytes."""
    quality = choose_quality(refs, limit)
    with atomic_write(path) as temporary:
        with tarfile.open(temporary, "w") as tar:
            for i, ref in enumerate(refs):
                data = encode(ref, quality)
                info = tarfile.TarInfo(f"{i:06d}.webp")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        if temporary.stat().st_size > limit:
            raise InputError(f"the training tar must be at most {limit:.0f} bytes; quality {quality} was not enough")
    return quality


def pack(shared: Path, out: Path, train_mb: float = TRAIN_MB, total_mb: float = TOTAL_MB) -> None:
    """Fill ``out``. Raises InputError if ``shared`` has no training shards or the pack is too large."""
    shards = sorted((shared / "data").glob("train256-*.tar"))
    if not shards:
        raise InputError(f"SHARED must hold data/train256-*.tar, got {shared}")
    (out / "fixtures").mkdir(parents=True, exist_ok=True)
    for fixture in sorted((shared / "fixtures").iterdir()):
        with atomic_write(out / "fixtures" / fixture.name) as temporary:
            shutil.copyfile(fixture, temporary)
    refs = find_images(shards)
    quality = write_train_tar(refs, out / "train.tar", train_mb * 1e6)
    total = sum(p.stat().st_size for p in out.rglob("*") if p.is_file()) / 1e6
    print(f"{out}: {len(refs)} training images as WebP quality {quality}, {total:.1f} MB in all")
    if total > total_mb:
        raise InputError(f"the pack must be at most {total_mb:g} MB, got {total:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--train-mb", type=float, default=TRAIN_MB, help="default: %(default)s")
    parser.add_argument("--total-mb", type=float, default=TOTAL_MB, help="default: %(default)s")
    args = parser.parse_args()
    pack(args.shared, args.out, args.train_mb, args.total_mb)


if __name__ == "__main__":
    sys.exit(run_program(main))
