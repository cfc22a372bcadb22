"""How much memory PiD's activations take, and how many rows of a pixel block run at once."""

from __future__ import annotations

from msdd_fast.families.pid.config import PiDConfig, swiglu_hidden_size

CHUNK_BYTES = 2**28
"""What the rows of a pixel block that run at once may take, if nothing is short."""
MIN_ROWS = 16


def bytes_per_row(config: PiDConfig, itemsize: int) -> int:
    """Bound on what one row (the pixels of one patch) of a pixel block takes in plain PyTorch, the most that it may.

    Alive at once: four modulations, the pixels, their norm and the result, and the MLP's hidden layer twice.
    """
    dec = config.decoder
    return dec.patch_size**2 * dec.pixel_width * (4 + 5 + 8) * max(itemsize, 4)


def chunk_rows(config: PiDConfig, itemsize: int, room: int = CHUNK_BYTES) -> int:
    """Rows that take at most ``room`` bytes, at least MIN_ROWS."""
    return max(MIN_ROWS, room // bytes_per_row(config, itemsize))


def chunk_bytes(config: PiDConfig, itemsize: int) -> int:
    """What the chunks of a pixel block take for an image of ``config.image_size``, if nothing is short."""
    tokens = (config.image_size // config.decoder.patch_size) ** 2
    return min(CHUNK_BYTES, tokens * bytes_per_row(config, itemsize))


def activation_bytes(config: PiDConfig, itemsize: int, guided: bool, chunk: int | None = None) -> int:
    """Upper bound on the bytes of the activations of one image of ``config.image_size``.

    ``chunk``: what the rows of a pixel block that run at once take; None if nothing is short.

    Alive at once at most: features and offsets of all injections; with them the convolutions of the latents (4 maps),
    or a joint block (streams, qkv, normalised q and k, attention, or the SwiGLU), or the pixels and the attention of a
    pixel block with a chunk of its rows; besides, the state, the velocity and the image.
    """
    dec, lat, side = config.decoder, config.features, config.image_size
    chunk = chunk_bytes(config, itemsize) if chunk is None else chunk
    tokens, width = (side // dec.patch_size) ** 2, dec.hidden_size
    injections = config.injections + lat.pixel_injection
    offset = 4 * (width if lat.gate == "channel" else 1)
    kept = tokens * injections * (width * itemsize + offset)
    inner = swiglu_hidden_size(width)
    rows = tokens + dec.text_length
    latents = 4 * lat.width * tokens * itemsize
    joint = rows * (4 * width + max(7 * width, width + 3 * inner)) * itemsize
    pixels = tokens * (2 * dec.patch_size**2 * dec.pixel_width + 8 * dec.attention_width + 2 * width) * itemsize
    tables = 4 * rows * (width // dec.heads + dec.attention_width // dec.attention_heads) * 3
    image = 3 * side**2 * (4 * 4 + 2 * itemsize + (8 * 2))  # float64 in the step, where it is plain PyTorch
    texts = (2 if guided else 1) * dec.text_length * width * itemsize
    return kept + max(latents, joint, pixels + chunk) + tables + image + texts
