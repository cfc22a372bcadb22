"""Training data: sources, order, augmentation, bad input."""

import io
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from msdd_fast.errors import InputError
from msdd_fast.training.data import CropConfig, ImageDataset, find_images
from msdd_fast.training.data.crop import crop_image
from msdd_fast.training.data.loader import MicroBatches
from msdd_fast.training.data.sources import ImageRef, ImageRefs, expand_braces


def picture(seed, size=(40, 30)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images/sub").mkdir(parents=True)
    for i in range(4):
        picture(i).save(tmp_path / f"images/{i}.png")
    picture(9).save(tmp_path / "images/sub/9.JPG", format="JPEG")
    (tmp_path / "images/notes.txt").write_text("not an image")
    return tmp_path / "images"


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / "shard.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(3):
            buffer = io.BytesIO()
            picture(100 + i).save(buffer, format="PNG")
            for name, data in ((f"{i:06d}.png", buffer.getvalue()), (f"{i:06d}.cls", b"7")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def test_folders_and_shards(folder, shard):
    refs = find_images([folder, shard])
    assert [r.path.name for r in refs] == ["0.png", "1.png", "2.png", "3.png", "9.JPG", *["shard.tar"] * 3]
    for i, ref in enumerate(refs[5:]):
        stored = Image.open(io.BytesIO(ref.read()))
        assert np.array_equal(np.asarray(stored), np.asarray(picture(100 + i)))


def png(seed, **options):
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG", **options)
    return buffer.getvalue()


def make_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_hidden_companions_are_no_images_in_shards_either(tmp_path, caplog):
    """What macOS's tar adds; and images of other formats are counted."""
    members = {f"./{i}.png": png(i) for i in range(3)}
    fork = b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(100)
    members |= {"./._0.png": fork, "__MACOSX/1.png": fork, "a/__MACOSX/._1.png": fork, "a/.cache/x.png": fork}
    members |= {"../3.PNG": png(3), "a/x.heic": b"", "a/y.HEIC": b"", "a/z.jfif": b"", "a/._w.gif": b""}
    refs = find_images([make_tar(tmp_path / "shard.TAR", members)])
    assert [r.read() for r in refs] == [png(i) for i in range(4)]
    assert "shard.TAR: passed over 2 .heic, 1 .jfif; read are .bmp, " in caplog.text
    only = make_tar(tmp_path / "only.tar", {"a.avif": b"", "._b.png": b""})
    with pytest.raises(InputError, match=r"data shard .*only.tar holds no images \(.*\); passed over: 1 \.avif"):
        find_images([only])


def test_a_folder_of_shards(tmp_path, shard):
    folder = tmp_path / "data"
    (folder / "more").mkdir(parents=True)
    shutil.copy(shard, folder / "b.TAR")
    make_tar(folder / "more" / "a.tar", {"x.png": png(5)})
    (folder / "._b.tar").write_bytes(b"no tar")
    expected = [r.read() for r in find_images([shard])] + [png(5)]
    assert [r.read() for r in find_images([folder])] == expected
    (folder / "z.png").write_bytes(png(6))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "y.png").write_bytes(png(7))
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "more" / "loop").symlink_to(folder)
    assert [r.read() for r in find_images([folder])] == [png(7), png(6), *expected]  # images first, then shards
    data = ImageDataset(find_images([folder]), 16, seed=0)
    assert not [bad for g in range(len(data)) for bad in data.sample(g).unreadable]


def test_odd_metadata_ends_no_training(tmp_path):
    """A camera's EXIF field of the wrong type is no reason to stop, or to pass the image over."""
    entries = [(0x0112, 3, 1, b"\6\0\0\0"), (0x011A, 2, 4, b"72\0\0"), (0x0128, 2, 4, b"in\0\0")]
    ifd = struct.pack("<H", 3) + b"".join(struct.pack("<HHI", *e[:3]) + e[3] for e in sorted(entries)) + bytes(4)
    exif = b"Exif\0\0II*\0" + struct.pack("<I", 8) + ifd
    Image.fromarray(np.zeros((40, 80, 3), np.uint8)).save(tmp_path / "a.jpg", exif=exif)
    sample = ImageDataset(find_images([tmp_path]), 16, seed=0).sample(0)
    assert not sample.unreadable and sample.image.shape == (3, 16, 16)


def test_every_epoch_is_a_permutation_of_its_own(folder):
    data = ImageDataset(find_images([folder]), 16, seed=3)
    epochs = [[data.index_of(5 * e + i) for i in range(5)] for e in range(4)]
    assert all(sorted(e) == list(range(5)) for e in epochs)
    assert len({tuple(e) for e in epochs}) > 1
    assert [data.index_of(i) for i in range(5)] == epochs[0]  # going back is possible


def test_a_sample_depends_on_its_index_and_seed_only(folder):
    refs = find_images([folder])
    a, b = ImageDataset(refs, 16, seed=3), ImageDataset(refs, 16, seed=3)
    for g in (7, 0, 12):
        assert torch.equal(a[g], b[g])
    other = ImageDataset(refs, 16, seed=4)
    assert any(not torch.equal(a[g], other[g]) for g in range(5))
    assert a[0].shape == (3, 16, 16) and a[0].dtype == torch.float32
    assert a[0].min() >= -1 and a[0].max() <= 1


def test_whole_picture_without_augmentation(tmp_path):
    picture(0, (16, 16)).save(tmp_path / "a.png")
    data = ImageDataset(find_images([tmp_path]), 16, seed=0, crop=CropConfig(min_crop=1.0, flip=False))
    expected = torch.from_numpy(np.asarray(picture(0, (16, 16))).copy()).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(data[5], expected)


def test_bad_sources(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.tar").write_bytes(b"x" * 2000)
    tarfile.open(tmp_path / "none.tar", "w").close()
    for source, message in (
        (tmp_path / "missing", r"data must be folders or .tar shards, got .*missing"),
        (tmp_path / "empty", r"no images \(.*\) found in .*empty"),
        (tmp_path / "none.tar", r"data shard .*none.tar holds no images"),
        (tmp_path / "broken.tar", r"data shard .*broken.tar is not a readable, uncompressed tar file"),
    ):
        with pytest.raises(InputError, match=message):
            find_images([folder, source])


def test_a_damaged_picture_is_named(tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"not a jpeg")
    with pytest.raises(InputError, match=r"the last: .*bad.jpg is not a readable image: its format"):
        ImageDataset(find_images([tmp_path]), 16, seed=0)[0]
    with pytest.raises(InputError, match=r"min_crop must be in \(0, 1\], got 0"):
        CropConfig(min_crop=0)


@pytest.fixture
def damaged(tmp_path):
    """Three good pictures of three kinds, a truncated one, and a text that is called a picture."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    picture(0).save(folder / "a.png")
    picture(1).convert("L").save(folder / "grey.png")
    picture(2).convert("CMYK").save(folder / "cmyk.jpg")
    buffer = io.BytesIO()
    picture(3, (200, 200)).save(buffer, format="JPEG")
    (folder / "cut.jpg").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    (folder / "text.jpg").write_text("no picture")
    return folder


def test_the_next_readable_picture_takes_the_place(damaged):
    data = ImageDataset(find_images([damaged]), 16, seed=0)
    samples = [data.sample(g) for g in range(10)]
    for epoch in (samples[:5], samples[5:]):
        names = [name for s in epoch for name, _ in s.unreadable]
        assert {name.rsplit("/", 1)[1] for name in names} == {"cut.jpg", "text.jpg"}
    assert all(s.image.shape == (3, 16, 16) and s.image.isfinite().all() for s in samples)
    again = ImageDataset(find_images([damaged]), 16, seed=0)
    assert torch.equal(again.sample(7).image, samples[7].image)
    reasons = dict(reason for s in samples for reason in s.unreadable)
    assert {r.split(" is not a readable image: ")[1][:15] for r in reasons.values()} == {
        "image file is t",
        "its format is n",
    }


def test_a_grey_and_a_cmyk_picture_are_rgb(damaged):
    refs = [r for r in find_images([damaged]) if r.path.name in ("grey.png", "cmyk.jpg")]
    data = ImageDataset(refs, 30, seed=0, crop=CropConfig(crop="center", flip=False))
    for g in range(2):
        image = data.sample(g).image
        if data.refs[data.index_of(g)].path.name == "grey.png":
            assert torch.equal(image[0], image[1]) and torch.equal(image[1], image[2])
        else:
            assert not torch.equal(image[0], image[1])


@pytest.mark.parametrize("crop", ["random", "adm", "center"])
def test_crops(crop):
    """A picture whose red is its column and whose green is its row: what is cut out is a square of the right size."""
    ramp = np.arange(256, dtype=np.uint8)
    pixels = np.stack(np.broadcast_arrays(ramp[None, :], ramp[:200, None], np.uint8(0)), axis=-1)
    sides = []
    for seed in range(20):
        config = CropConfig(crop=crop, min_crop=0.5, flip=False)
        out = crop_image(Image.fromarray(np.ascontiguousarray(pixels)), 50, config, random.Random(seed))
        values = np.asarray(out).astype(int)
        across = values[25, -1, 0] - values[25, 0, 0]
        assert out.size == (50, 50) and abs(across - (values[-1, 25, 1] - values[0, 25, 1])) <= 6
        sides.append(across / 49 * 50 / 200)
    if crop == "center":
        assert np.allclose(sides, 1, atol=0.05)
    else:
        assert 0.45 < min(sides) < 0.7 and 0.8 < max(sides) < 1.05


def test_micro_batches_share_every_step():
    def samples(world, micro):
        steps = [[], [], []]
        for rank in range(world):
            sampler = list(MicroBatches(range(2, 5), 12, micro, rank, world))
            assert len(sampler) == len(MicroBatches(range(2, 5), 12, micro, rank, world))
            each = len(sampler) // 3
            for step in range(3):
                steps[step] += [g for part in sampler[step * each : (step + 1) * each] for g in part]
        return steps

    whole = [list(range(24, 36)), list(range(36, 48)), list(range(48, 60))]
    assert samples(1, 12) == samples(2, 3) == samples(3, 4) == samples(1, 1) == whole


def test_many_shards_by_one_name(shard, tmp_path):
    assert expand_braces("a-{08..10}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert expand_braces("{0..1}{2..3}") == ["02", "03", "12", "13"] and expand_braces("x{a}") == ["x{a}"]
    for i in range(2):
        shutil.copy(shard, tmp_path / f"s{i}.tar")
    assert len(find_images([f"{tmp_path}/s{{0..1}}.tar"])) == 6
    with pytest.raises(InputError, match=r"data must name shards in rising order, got \{3..1\}"):
        expand_braces("s{3..1}.tar")


def test_a_shard_from_a_pipe(shard, tmp_path):
    """The command runs once; what it wrote is kept, and damaged or unreachable shards are not."""
    cache, counter = tmp_path / "cache", tmp_path / "counter"
    source = f"pipe:echo run >> {counter} && cat {shard}"
    direct, piped, again = (find_images([s], cache) for s in (shard, source, source))
    assert [r.read() for r in piped] == [r.read() for r in direct] == [r.read() for r in again]
    assert counter.read_text() == "run\n"
    for bad, message in (
        (f"pipe:cat {tmp_path}/none.tar", r"data shard pipe:cat .* is unreachable: exit status 1: .*No such file"),
        ("pipe:false | cat", r"data shard pipe:false \| cat is unreachable: exit status 1$"),
        ("pipe:echo hello", r"data shard pipe:echo hello is not a readable, uncompressed tar file"),
    ):
        with pytest.raises(InputError, match=message):
            find_images([bad], cache)
    assert not list(cache.glob("*.tmp"))
    with pytest.raises(InputError, match="data from a pipe needs cache, a folder for its shards, got none"):
        find_images([source])


@pytest.mark.parametrize("keep", [100, 0.3, "without its end"])
def test_only_shards_that_read_to_their_end_are_kept(shard, tmp_path, keep):
    """A command that is cut off and still ends well: the shard is refused by name, and asked for again next time."""
    whole = shard.read_bytes()
    end = max(i for i in range(0, len(whole), 512) if any(whole[i : i + 512])) + 512
    size = end if keep == "without its end" else keep if keep == 100 else int(end * keep)
    (tmp_path / "cut.tar").write_bytes(whole[:size])
    cache, source = tmp_path / "cache", f"pipe:cat {tmp_path}/cut.tar"
    with pytest.raises(InputError, match=r"data shard pipe:cat .*cut.tar is not a readable, uncompressed tar file"):
        find_images([source], cache)
    assert [p.suffix for p in cache.iterdir()] == [".lock"]
    (tmp_path / "cut.tar").write_bytes(whole)
    assert len(find_images([source], cache)) == 3
    (kept,) = cache.glob("*.tar")
    kept.write_bytes(b"x" * 600)  # damaged later: the message names it
    with pytest.raises(InputError, match=rf"kept as {kept}; delete that to run the command again"):
        find_images([source], cache)


def test_references_are_a_few_arrays(folder, shard):
    refs = [*find_images([folder, shard]), ImageRef(Path(os.fsdecode(b"/\xff\xc3\xa4")), 2**40, 0)]
    kept = ImageRefs(refs)
    assert list(kept) == refs and len(kept) == len(refs) and kept[-1] == refs[-1] and kept[2:4] == refs[2:4]
    assert kept.sha256() == ImageRefs(refs).sha256() != ImageRefs(refs[1:]).sha256()
    assert list(pickle.loads(pickle.dumps(kept))) == refs and list(ImageRefs([])) == []
    with pytest.raises(IndexError):
        kept[len(refs)]


FLAT_MEMORY = """
import gc, os, re
from pathlib import Path

from msdd_fast.training.data import ImageDataset
from msdd_fast.training.data.sources import ImageRef

data = ImageDataset([ImageRef(Path(f"/data/{i:08d}.jpg")) for i in range(100_000)], 16, seed=0)
data.index_of(0)


def private():
    found = re.search(r"Private_Dirty: +([0-9]+)", Path("/proc/self/smaps_rollup").read_text())
    return int(found[1]) / 1024


child = os.fork()
if child == 0:
    gc.collect()
    before = private()
    for g in range(len(data)):
        data.refs[data.index_of(g)]
    os._exit(int(private() - before))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux")
def test_a_workers_memory_is_flat():
    """Looking up 100,000 images in a forked process copies none of what it shares with its parent.

    In a process of its own: the heap of this one has been through everything before.
    """
    run = subprocess.run([sys.executable, "-c", FLAT_MEMORY], capture_output=True, text=True, check=True)
    assert int(run.stdout) <= 8  # MiB; a list of objects needs 25


def test_without_fcntl(monkeypatch, tmp_path):
    """As on Windows: a pipe says what it lacks."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with pytest.raises(InputError, match="data from a pipe needs Python's module fcntl, which this system lacks"):
        find_images(["pipe:true"], tmp_path)
