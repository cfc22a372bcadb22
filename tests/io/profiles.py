"""ICC profiles, written by hand."""

import struct


def _fixed(*values):
    return b"".join(struct.pack(">i", round(v * 65536)) for v in values)


def icc(space, tags, kind=b"mntr", pcs=b"XYZ "):
    tags = {**tags, b"wtpt": b"XYZ \0\0\0\0" + _fixed(0.9642, 1, 0.8249), b"cprt": b"text\0\0\0\0none"}
    tags[b"desc"] = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(78)
    table, body, start = b"", b"", 132 + 12 * len(tags)
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data
    head = struct.pack(">I4xI", start + len(body), 0x02400000) + kind + space + pcs
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + _fixed(0.9642, 1, 0.8249)
    return head + bytes(128 - len(head)) + struct.pack(">I", len(tags)) + table + body


def gamma(value):
    return b"curv\0\0\0\0" + struct.pack(">IHH", 1, round(value * 256), 0)


def wide():
    """RGB with the primaries of Adobe RGB and gamma 2.2."""
    primaries = {
        b"rXYZ": (0.60974, 0.31111, 0.01947),
        b"gXYZ": (0.20528, 0.62567, 0.06087),
        b"bXYZ": (0.14919, 0.06322, 0.74457),
    }
    tags = {name: b"XYZ \0\0\0\0" + _fixed(*xyz) for name, xyz in primaries.items()}
    return icc(b"RGB ", {**tags, **{name: gamma(2.2) for name in (b"rTRC", b"gTRC", b"bTRC")}})


def linear_grey():
    return icc(b"GRAY", {b"kTRC": gamma(1.0)})


def cmyk():
    """A table of 2 nodes an ink: paper of L 90, inks that darken, cyan and magenta with a hue."""
    ramp = bytes(range(256))
    nodes = bytearray()
    for i in range(16):
        c, m, y, k = (i >> 3) & 1, (i >> 2) & 1, (i >> 1) & 1, i & 1
        nodes += bytes((max(0, 230 - 60 * c - 70 * m - 20 * y - 200 * k), 128 - 40 * c + 60 * m, 128 - 40 * c + 70 * y))
    table = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + _fixed(1, 0, 0, 0, 1, 0, 0, 0, 1) + ramp * 4 + nodes + ramp * 3
    return icc(b"CMYK", {b"A2B0": table}, b"prtr", b"Lab ")
