"""What an image file says besides its pixels: orientation, ICC profile, the layout of a TIFF.

Decoders trip over metadata that nobody needs: an EXIF field of an unexpected type, a text that unpacks to gigabytes, a
damaged index of further pages. ``split`` reads the few fields that decide how the pixels look and takes the others out
of JPEG, PNG and TIFF files before a decoder sees them. Nothing here raises: a field that cannot be read is absent.
"""

from __future__ import annotations

import contextlib
import struct
import zlib
from typing import Any, NamedTuple

ORIENTATION, PROFILE = 0x0112, 0x8773
BITS, COMPRESSION, PHOTOMETRIC, PLANES, SUBSAMPLING, SAMPLE_FORMAT = 258, 259, 262, 284, 530, 339
SAMPLE_MINIMUM, SAMPLE_MAXIMUM = 340, 341
MAX_PROFILE = 2**23  # bytes; the largest in use have 3 MB

# The tags that decide the pixels of a TIFF.
_LAYOUT_TAGS = frozenset(
    (
        *(254, 256, 257, *range(BITS, PHOTOMETRIC + 1), 266, 273, 277, 278, 279, PLANES, 292, 293, 317, 320),
        *(322, 323, 324, 325, 332, 338, SAMPLE_FORMAT, 347, *range(512, 522), *range(529, 533)),
    )
)
# TIFF field type -> struct code of one value.
_CODES = {
    **{1: "B", 3: "H", 4: "L", 5: "LL", 6: "b", 7: "B", 8: "h", 9: "l", 10: "ll"},
    **{11: "f", 12: "d", 13: "L", 16: "Q", 17: "q", 18: "Q"},
}
_MAX_VALUES = 64  # of one field; channels have a value each


class Directory:
    """The first directory of a TIFF file or of an EXIF block, classic or BigTIFF. Empty where there is none."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._order = {b"II": "<", b"MM": ">"}.get(data[:2], "")
        self._start = self._end = 0
        self._big = False
        self._entries: dict[int, tuple[int, int, int]] = {}  # tag: type, count, place of the entry
        with contextlib.suppress(struct.error):  # cut off: what was read counts
            self._read()

    def _read(self) -> None:
        if not self._order:
            return
        version = self._unpack("H", 2)[0]
        self._big = version == 43
        if version not in (42, 43):
            return
        self._start = self._unpack("Q", 8)[0] if self._big else self._unpack("L", 4)[0]
        count = self._unpack("Q" if self._big else "H", self._start)[0]
        size, first = (20, self._start + 8) if self._big else (12, self._start + 2)
        if first + count * size > len(self._data):
            count = max(0, (len(self._data) - first) // size)
        else:
            self._end = first + count * size
        for at in range(first, first + count * size, size):
            tag, kind = self._unpack("HH", at)
            self._entries.setdefault(tag, (kind, self._unpack("Q" if self._big else "L", at + 4)[0], at))

    def _unpack(self, code: str, at: int) -> tuple[Any, ...]:
        if at > len(self._data):  # past what the struct module takes as a place
            raise struct.error
        return struct.unpack_from(self._order + code, self._data, at)

    def _place(self, at: int, size: int) -> int:
        """Where the value of the entry at ``at`` is: in the entry if it fits, else where the entry points."""
        inside, code, room = (at + 12, "Q", 8) if self._big else (at + 8, "L", 4)
        return inside if size <= room else int(self._unpack(code, inside)[0])

    def numbers(self, tag: int) -> tuple[float, ...]:
        """The values of a numeric field; () if it is absent, not numeric or cut off."""
        kind, count, at = self._entries.get(tag, (0, 0, 0))
        code = _CODES.get(kind)
        if code is None or not 0 < count <= _MAX_VALUES:
            return ()
        try:
            size = struct.calcsize(self._order + code * count)
            values = self._unpack(code * count, self._place(at, size))
        except struct.error:
            return ()
        if len(code) == 2:
            return tuple(a / b if b else 0.0 for a, b in zip(values[::2], values[1::2], strict=True))
        return values

    def raw(self, tag: int) -> bytes | None:
        """The bytes of a field of bytes; None if it is absent, of another type or cut off."""
        kind, count, at = self._entries.get(tag, (0, 0, 0))
        if kind not in (1, 7) or not 0 < count <= MAX_PROFILE:
            return None
        try:
            place = self._place(at, count)
        except struct.error:
            return None
        value = self._data[place : place + count]
        return value if len(value) == count else None

    @property
    def orientation(self) -> int:
        """1 to 8; 1 where there is none, or no such number."""
        values = self.numbers(ORIENTATION)
        return int(values[0]) if values and values[0] in range(1, 9) else 1

    @property
    def big_endian(self) -> bool:
        return self._order == ">"

    @property
    def white_is_zero(self) -> bool:
        return self.numbers(PHOTOMETRIC) == (0,)

    @property
    def tile(self) -> tuple[int, int]:
        """Width and height of a tile, which a decoder allocates whole; 0 where there are none."""
        width, height = ((*self.numbers(tag), 0)[0] for tag in (322, 323))
        return int(width), int(height)

    def layout_only(self) -> bytes:
        """The file with the tags in its first directory that decide the pixels, and with no further directory.

        Greys of more than 8 bits say BlackIsZero: not all decoders turn them around, so the caller does.
        """
        if not self._end:
            return self._data
        size = 20 if self._big else 12
        places = [at for tag, (_, _, at) in self._entries.items() if tag in _LAYOUT_TAGS]
        kept = [self._data[at : at + size] for at in places]
        if self.white_is_zero and max(self.numbers(BITS), default=1) > 8:
            head = struct.pack(self._order + ("HHQH" if self._big else "HHLH"), PHOTOMETRIC, 3, 1, 1)
            kept = [head.ljust(size, b"\0") if e[:2] == head[:2] else e for e in kept]
        count = struct.pack(self._order + ("Q" if self._big else "H"), len(kept))
        directory = count + b"".join(kept) + bytes(8 if self._big else 4)
        data = bytearray(self._data)
        data[self._start : self._start + len(directory)] = directory
        return bytes(data)


class Metadata(NamedTuple):
    """What ``split`` finds.

    ``data`` is the file to decode. ``orientation`` is EXIF's, 1 to 8; ``profile`` an ICC profile or None. Both are None
    for formats whose decoder gives them. ``directory`` is that of a TIFF; ``deep_key`` says that a PNG names a
    transparent colour with 16 bits a channel.
    """

    data: bytes
    orientation: int | None = None
    profile: bytes | None = None
    directory: Directory | None = None
    deep_key: bool = False


def split(data: bytes) -> Metadata:
    """Metadata of a file, and the file without it."""
    if data.startswith(b"\xff\xd8\xff"):
        return _split_jpeg(data)
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _split_png(data)
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        directory = Directory(data)
        return Metadata(directory.layout_only(), directory.orientation, directory.raw(PROFILE), directory)
    return Metadata(data)


def exif_orientation(exif: object) -> int:
    """The orientation in an EXIF block, with or without its head; 1 where there is none."""
    return Directory(exif.removeprefix(b"Exif\0\0")).orientation if isinstance(exif, bytes) else 1


def _split_jpeg(data: bytes) -> Metadata:
    kept, exif, profile = [data[:2]], b"", {}
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker == 0xDA or length < 2:  # the pixels begin, or this is damaged
            break
        end = at + 2 + length
        body = data[at + 4 : end]
        if marker == 0xE1 and body.startswith(b"Exif\0\0"):
            exif += body[6:]
        elif marker == 0xE2 and body.startswith(b"ICC_PROFILE\0") and len(body) > 14:
            profile[body[12]] = body[14:]
            count = body[13]
        if not 0xE0 <= marker <= 0xEF or marker in (0xE0, 0xEE):  # JFIF and Adobe say how to read the colours
            kept.append(data[at:end])
        at = end
    whole = bool(profile) and sorted(profile) == list(range(1, count + 1))
    icc = b"".join(profile[i] for i in sorted(profile)) if whole else None
    return Metadata(b"".join((*kept, data[at:])), exif_orientation(exif), icc)


def _split_png(data: bytes) -> Metadata:
    kept, exif, profile = [data[:8]], b"", None
    header, has_key = b"", False
    at = 8
    while at + 8 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        kind, body = data[at + 4 : at + 8], data[at + 8 : end - 4]
        if kind == b"IHDR":
            header = body
        elif kind == b"tRNS":
            has_key = True
        elif kind == b"eXIf":
            exif = body
        elif kind == b"iCCP":
            profile = _inflate(body.partition(b"\0")[2][1:])
        if kind == b"tRNS" and header[8:10] in (b"\x02\0", b"\x04\0") and len(body) == 2:
            kept.append(_scaled_key(body, header[8]))
        elif kind[:1].isupper() or kind == b"tRNS":  # critical, in the PNG specification's sense
            kept.append(data[at:end])
        at = end
        if kind == b"IEND":
            break
    deep_key = has_key and header[8:10] == b"\x10\x02"
    return Metadata(b"".join(kept), exif_orientation(exif), profile, deep_key=deep_key)


def _scaled_key(body: bytes, bits: int) -> bytes:
    """The tRNS chunk of a grey image of 2 or 4 bits, for a decoder that compares it after scaling to 8 bits."""
    grey = int.from_bytes(body, "big") * (255 // (2**bits - 1))
    body = b"tRNS" + min(grey, 0xFFFF).to_bytes(2, "big")
    return b"\0\0\0\2" + body + zlib.crc32(body).to_bytes(4, "big")


def _inflate(data: bytes) -> bytes | None:
    unpacker = zlib.decompressobj()
    try:
        unpacked = unpacker.decompress(data, MAX_PROFILE)
    except zlib.error:
        return None
    return unpacked if unpacker.eof else None
