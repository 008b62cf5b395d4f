# SPDX-License-Identifier: Apache-2.0
"""One image file: opened with care, decoded to RGB, brought to size."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..opening import open_regular
from .dataset import DataError

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".jpg", ".jpeg", ".png")

# Change it with any change of the pixels that files decode to: decoded images on disk are then made again.
VERSION = 2

_FORMATS = ("JPEG", "PNG")
# What happens to a single file. Other errors, of a failing disk or too many open files, are not the image's.
_OF_THE_FILE = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENXIO, errno.ENODEV),
    *(errno.EISDIR, errno.EINVAL),  # of `open_regular`
)
# Greys of fewer than 8 bits are scaled when they are decoded, the one that means transparent is not.
_GREY_SCALES = {"1": 255, "L;2": 85, "L;4": 17}


class ImageError(DataError):
    """An image that cannot be read, while others may. `name` is its path, `reason` why not."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason

    def __reduce__(self):
        return type(self), (self.name, self.reason)


def shown(path: str | bytes | os.PathLike) -> str:
    """A path as text that can be printed: bytes that are not UTF-8 become escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def require_pillow() -> None:
    """Raises DataError where Pillow is not installed."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise DataError(f"imagefolder needs Pillow ({error}): pip install pillow") from error


def decode(path: str | bytes | Path) -> Image.Image:
    """The JPEG or PNG file as an RGB image of 8 bits a channel, upright as its EXIF orientation says.

    Of 16 bits, the upper 8 count. Transparent pixels lie on white.

    Raises:
        ImageError: the file is truncated, no JPEG or PNG, not a regular file, larger than Pillow's `MAX_IMAGE_PIXELS`,
            or may not be read.
        DataError: reading failed for a reason that lies elsewhere.
    """
    require_pillow()
    from PIL import Image, UnidentifiedImageError

    name = shown(path)
    try:
        with open_regular(path) as file, Image.open(file, formats=_FORMATS) as image:
            limit = Image.MAX_IMAGE_PIXELS
            if limit and image.width * image.height > limit:
                raise ValueError(f"got {image.width}x{image.height} pixels, accepted are up to {limit} in all")
            raw_mode = image.tile[0][3] if image.tile else None
            image.load()
            _scale_transparency(image, raw_mode[0] if isinstance(raw_mode, tuple) else raw_mode)
            return _rgb(_upright(image))
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(name, "truncated, corrupt or no image: it does not begin as a JPEG or PNG file") from error
    except OSError as error:
        if error.errno is None:  # Pillow's own, without a number
            raise ImageError(name, f"truncated, corrupt or no image: {error}") from error
        if error.errno in _OF_THE_FILE:
            raise ImageError(name, f"cannot be read: {error.strerror}") from error
        raise DataError(f"{name}: {error.strerror}") from error
    except Exception as error:  # Pillow's decoders raise many types on a broken file, SyntaxError among them
        raise ImageError(name, f"truncated, corrupt or no image: {error}") from error


def fit(image: Image.Image, size: int, border: float = 0.0) -> Image.Image:
    """Scaled and cropped around the centre to `size` x `size` pixels, without a share `border` of each side."""
    from PIL import Image, ImageOps

    if image.size == (size, size) and not border:
        return image
    return ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR, bleed=border)


def _scale_transparency(image: Image.Image, raw_mode: str | None) -> None:
    """Brings a transparent colour to the scale of the decoded pixels, where Pillow leaves it as the file has it."""
    colour = image.info.get("transparency")
    if isinstance(colour, int) and raw_mode in _GREY_SCALES and image.mode in ("1", "L"):
        image.info["transparency"] = colour * _GREY_SCALES[raw_mode]
    elif isinstance(colour, tuple) and raw_mode == "RGB;16B":
        image.info["transparency"] = tuple(part >> 8 for part in colour)


def _upright(image: Image.Image) -> Image.Image:
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # broken metadata of a whole image: it says nothing then
        return image


def _rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    alpha = None
    if image.mode.startswith("I"):  # grey of 16 bits, which convert() would cut off at 255
        grey = np.asarray(image).astype(np.int64)
        if "transparency" in image.info:
            alpha = Image.fromarray(np.where(grey == image.info["transparency"], 0, 255).astype(np.uint8))
        image = Image.fromarray((grey >> 8).clip(0, 255).astype(np.uint8))
    elif "transparency" in image.info or image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        if image.mode == "1":
            colour = image.info["transparency"]
            image = image.convert("L")
            image.info["transparency"] = colour
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    image = image.convert("RGB")
    if alpha is None:
        return image
    return Image.composite(image, Image.new("RGB", image.size, "white"), alpha)
