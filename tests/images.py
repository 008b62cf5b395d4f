# SPDX-License-Identifier: Apache-2.0
"""What tests of image files share: PNG files of any kind, written byte by byte, and folders of them."""

from __future__ import annotations

import struct
import zlib

import numpy as np

from sparsebwd import data

GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6
CHANNELS = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGBA: 4}


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(pixels, depth, colour, *, palette=None, transparent=None, exif=None, size=None):
    """A PNG file as its specification has it.

    pixels: integers [H, W, channels], each of `depth` bits. palette: uint8 [n, 3]. transparent: the content of a tRNS
    chunk. exif: that of an eXIf chunk. size: width and height that the header claims.
    """
    pixels = np.asarray(pixels).reshape(*np.shape(pixels)[:2], CHANNELS[colour])
    rows = [np.unpackbits(row.astype(">u2").view(np.uint8)).reshape(-1, 16)[:, 16 - depth :] for row in pixels]
    lines = b"".join(b"\0" + np.packbits(row.ravel()).tobytes() for row in rows)
    width, height = size or pixels.shape[1::-1]
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    if palette is not None:
        content += chunk(b"PLTE", np.asarray(palette, np.uint8).tobytes())
    if transparent is not None:
        content += chunk(b"tRNS", transparent)
    if exif is not None:
        content += chunk(b"eXIf", exif)
    return content + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def exif(orientation):
    """A TIFF directory with nothing but an orientation."""
    return b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)


def write_classes(folder, train=4, test=2, size=(12, 10), classes=("cat", "dog")):
    """`folder`/train and `folder`/test with PNG files of noise, `size` high and wide, in each class."""
    draws = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for name in classes:
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                content = png(draws.integers(0, 256, (*size, 3)), 8, RGB)
                (folder / split / name / f"{index}.png").write_bytes(content)
    return folder


def load_classes(folder, **options):
    """The images of `write_classes`, with the cache beside the folder."""
    return data.load(
        "imagefolder", **{"data_dir": folder, "cache_dir": folder.parent / "cache", "image_size": 8} | options
    )
