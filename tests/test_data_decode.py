# SPDX-License-Identifier: Apache-2.0
"""Single image files: depths, transparency and orientation as their formats have them; what is no image, or too large."""

from __future__ import annotations

import os
import pickle
import struct

import numpy as np
import pytest
from images import CHANNELS, GREY, GREY_ALPHA, PALETTE, RGB, RGBA, exif, png
from PIL import EpsImagePlugin, Image

from sparsebwd.data import DataError
from sparsebwd.data.decode import ImageError, decode, fit, shown

KINDS = [(GREY, 1), (GREY, 2), (GREY, 4), (GREY, 8), (GREY, 16), (RGB, 8), (RGB, 16)]
KINDS += [(GREY_ALPHA, 8), (GREY_ALPHA, 16), (RGBA, 8), (RGBA, 16)]


def decoded(tmp_path, content, name="image.png"):
    path = tmp_path / name
    path.write_bytes(content)
    return np.asarray(decode(path)).astype(int)


def eight_bits(values, depth):
    """Samples on the scale 0 to 255; of 16 bits the upper 8."""
    return values >> 8 if depth == 16 else values * 255 // (2**depth - 1)


@pytest.mark.parametrize(("colour", "depth"), KINDS)
def test_every_depth(tmp_path, colour, depth):
    pixels = np.random.default_rng(depth).integers(0, 2**depth, (5, 7, CHANNELS[colour]))
    pixels[0, :2] = [[0], [2**depth - 1]]
    expected = eight_bits(pixels, depth)
    if colour in (GREY_ALPHA, RGBA):  # on white
        alpha = expected[..., -1:]
        expected = (expected[..., :-1] * alpha + 255 * (255 - alpha)) / 255
    np.testing.assert_allclose(
        decoded(tmp_path, png(pixels, depth, colour)), np.broadcast_to(expected, (5, 7, 3)), atol=0.51
    )


def test_grey_of_16_bits(tmp_path):
    """Not cut off at 255."""
    values = np.array([[0, 255, 256, 300, 30_000, 60_000, 65_535]])
    np.testing.assert_array_equal(
        decoded(tmp_path, png(values[..., None], 16, GREY))[0, :, 0], [0, 0, 1, 1, 117, 234, 255]
    )


@pytest.mark.parametrize(("colour", "depth"), [kind for kind in KINDS if kind[0] in (GREY, RGB)])
@pytest.mark.parametrize("which", ["low", "high"])
def test_a_transparent_colour_becomes_white(tmp_path, colour, depth, which):
    """Named by the file on the scale of its samples: the largest of 8 bits is a small one of 16."""
    value = 1 if which == "low" else min(2**depth - 1, 200)
    other = 2**depth - 1 if value != 2**depth - 1 else 0
    pixels = np.full((2, 2, CHANNELS[colour]), other)
    pixels[0, 1] = value
    transparent = struct.pack(f">{CHANNELS[colour]}H", *[value] * CHANNELS[colour])
    got = decoded(tmp_path, png(pixels, depth, colour, transparent=transparent))
    assert (got[0, 1] == 255).all()
    assert (got[[0, 1, 1], [0, 0, 1]] == eight_bits(np.array(other), depth)).all()


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
@pytest.mark.parametrize("transparent", [None, b"\0", b"\xff\0", b"\x80\xff"])
def test_palettes(tmp_path, depth, transparent):
    palette = np.array([[10, 20, 30], [200, 100, 0]])
    pixels = np.array([[0, 1, 1], [1, 0, 1]])
    alpha = np.array([*(transparent or b""), 255, 255])[:2, None]
    expected = ((palette * alpha + 255 * (255 - alpha)) / 255)[pixels]
    got = decoded(tmp_path, png(pixels[..., None], depth, PALETTE, palette=palette, transparent=transparent))
    np.testing.assert_allclose(got, expected, atol=0.51)


def test_colours_under_transparency_do_not_show(tmp_path):
    pixels = np.array([[[255, 0, 0, 0], [255, 0, 0, 255], [0, 0, 0, 51]]])
    np.testing.assert_array_equal(
        decoded(tmp_path, png(pixels, 8, RGBA))[0], [[255, 255, 255], [255, 0, 0], [204, 204, 204]]
    )


# What a viewer does to the stored pixels, by the number of the orientation.
UPRIGHT = {
    1: lambda image: image,
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.transpose(1, 0, 2),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: np.rot90(image, 2).transpose(1, 0, 2),
    8: lambda image: np.rot90(image),
}


@pytest.mark.parametrize("orientation", [*UPRIGHT, 0, 9])
def test_orientation(tmp_path, orientation):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 3))
    upright = UPRIGHT.get(orientation, UPRIGHT[1])
    np.testing.assert_array_equal(decoded(tmp_path, png(pixels, 8, RGB, exif=exif(orientation))), upright(pixels))
    stored = Image.fromarray(pixels.astype(np.uint8))
    stored.save(tmp_path / "image.jpg", exif=b"Exif\0\0" + exif(orientation))
    with Image.open(tmp_path / "image.jpg") as image:
        expected = upright(np.asarray(image))
    np.testing.assert_array_equal(np.asarray(decode(tmp_path / "image.jpg")), expected)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("broken", [b"", b"MM", b"MM\0*\xff\xff\xff\xff", exif(6)[:-9], b"\0" * 40])
def test_broken_orientation_says_nothing(tmp_path, broken):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 3))
    np.testing.assert_array_equal(decoded(tmp_path, png(pixels, 8, RGB, exif=broken)), pixels)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_jpeg_of_other_modes(tmp_path, mode):
    Image.new(mode, (8, 8), 90 if mode == "L" else (255, 0, 0, 0)).save(tmp_path / "image.jpg")
    got = np.asarray(decode(tmp_path / "image.jpg")).astype(int)
    np.testing.assert_allclose(got, np.broadcast_to([90] * 3 if mode == "L" else [0, 255, 255], (8, 8, 3)), atol=3)


# what is no image


def test_other_programs_are_never_started(tmp_path, monkeypatch):
    """Pillow hands PostScript to Ghostscript, whatever the name of the file."""
    marker = tmp_path / "started"
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch '{marker}'\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in ("gs_binary", "gs_windows_binary"):
        monkeypatch.setattr(EpsImagePlugin, name, None)
    path = tmp_path / "image.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(ImageError, match="image.png: truncated, corrupt or no image"):
        decode(path)
    assert not marker.exists()
    with pytest.raises(Exception), Image.open(path) as image:  # noqa: B017
        image.load()
    assert marker.exists()  # the trap works


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF", "PPM", "WEBP", "ICO"])
def test_other_formats_are_no_images(tmp_path, format):
    """Each has a decoder with faults of its own."""
    try:
        Image.new("RGB", (16, 16)).save(tmp_path / "image.png", format)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow does not write {format}")
    with pytest.raises(ImageError, match="no image"):
        decode(tmp_path / "image.png")


@pytest.mark.parametrize("kind", ["fifo", "link to a fifo", "device", "folder", "socket"])
def test_only_regular_files_are_opened(tmp_path, monkeypatch, deadline, kind):
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    path = tmp_path / "image.png"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "link to a fifo":
        os.mkfifo(tmp_path / "fifo")
        path.symlink_to("fifo")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        import socket

        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    with pytest.raises(ImageError, match="image.png: .*not a regular file"):
        decode(path)


def test_a_fifo_that_takes_the_place_of_a_file(tmp_path, monkeypatch, deadline):
    """Between the look at it and its opening."""
    path = tmp_path / "image.png"
    path.write_bytes(png(np.zeros((2, 2, 3)), 8, RGB))
    real = os.open

    def exchanged(name, *arguments, **options):
        os.unlink(path)
        os.mkfifo(path)
        return real(name, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", exchanged)
        with pytest.raises(ImageError, match="not a regular file"):
            decode(path)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ImageError, match="gone.png: cannot be read: No such file"):
        decode(tmp_path / "gone.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    with pytest.raises(ImageError, match="loop.png: cannot be read: Too many levels of symbolic links"):
        decode(tmp_path / "loop.png")
    (tmp_path / "file").touch()
    with pytest.raises(ImageError, match="below.png: cannot be read: Not a directory"):
        decode(tmp_path / "file" / "below.png")


@pytest.mark.parametrize("number", [5, 24])  # input/output error, too many open files
def test_faults_of_the_system_are_not_the_images(tmp_path, monkeypatch, number):
    path = tmp_path / "image.png"
    path.touch()

    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fail)
        with pytest.raises(DataError, match=f"image.png: {os.strerror(number)}") as caught:
            decode(path)
    assert not isinstance(caught.value, ImageError)


# sizes


@pytest.mark.parametrize("width", [11, 100])  # above Pillow's limit, and above twice the limit
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_more_pixels_than_the_limit(tmp_path, monkeypatch, width):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    content = png(np.zeros((10, width, 3)), 8, RGB)
    with pytest.raises(ImageError, match="limit|accepted are up to 100"):
        decoded(tmp_path, content)
    assert decoded(tmp_path, png(np.zeros((10, 10, 3)), 8, RGB)).shape == (10, 10, 3)


def test_decompression_bombs(tmp_path):
    """A few bytes that claim to be more pixels than there is memory."""
    with pytest.raises(ImageError, match="limit|accepted are up to"):
        decoded(tmp_path, png(np.zeros((1, 1, 3)), 8, RGB, size=(2**31 - 1, 2**31 - 1)))


# truncated files


@pytest.mark.parametrize("format", ["PNG", "JPEG", "progressive"])
def test_truncated_anywhere(tmp_path, format):
    """An error, or all pixels: what follows them may be missing."""
    pixels = np.random.default_rng(1).integers(0, 256, (24, 24, 3), np.uint8)
    path = tmp_path / "image.png"
    options = {"progressive": True} if format == "progressive" else {}
    Image.fromarray(pixels).save(path, "JPEG" if options else format, **options)
    content, whole = path.read_bytes(), np.asarray(decode(path))
    refused = 0
    for length in {*range(0, len(content), 7), *range(len(content) - 40, len(content))}:
        path.write_bytes(content[:length])
        try:
            np.testing.assert_array_equal(np.asarray(decode(path)), whole)
        except ImageError as error:
            refused += 1
            assert error.reason.startswith("truncated, corrupt or no image: ")
    assert refused > len(content) // 7 - 2


def test_bytes_that_are_not_utf8_are_shown_as_escapes(tmp_path):
    assert shown(b"a\xff\n") == "a\\xff\n"
    with pytest.raises(ImageError) as caught:
        decode(os.fsencode(tmp_path) + b"/\xfe.png")
    assert caught.value.name.endswith("/\\xfe.png")
    again = pickle.loads(pickle.dumps(caught.value))  # as from a worker process
    assert (again.name, again.reason, str(again)) == (caught.value.name, caught.value.reason, str(caught.value))


def test_fit_cuts_off_a_border():
    image = Image.fromarray(np.pad(np.full((8, 8, 3), 90, np.uint8), ((1, 1), (1, 1), (0, 0))))
    assert fit(image, 10) is image
    np.testing.assert_array_equal(np.asarray(fit(image, 8, 0.1)), 90)
