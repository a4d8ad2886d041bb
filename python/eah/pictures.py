"""Pictures from files, in the 8-bit RGB that image processors take."""

from __future__ import annotations


def read_picture(path, *, upright: bool):
    """A PIL image in RGB; of an animation the first picture. upright: an orientation in the file's EXIF is applied.

    Raises:
        ImportError: Pillow is not installed.
        ValueError: there is no such file, or no picture in it that can be read.
    """
    try:
        from PIL import Image, ImageOps
    except ModuleNotFoundError as missing:
        raise ImportError("reading a picture needs Pillow: pip install pillow") from missing
    try:
        with Image.open(path) as picture:
            return in_rgb(ImageOps.exif_transpose(picture) if upright else picture)
    except FileNotFoundError as missing:
        raise ValueError(f"there is no picture {path}") from missing
    except Exception as error:  # a decoder raises what it likes
        raise ValueError(f"{path} is no picture that can be read: {error}") from error


def in_rgb(picture):
    """A PIL image with 8 bits a colour; of 16-bit grey it is the upper ones, as Pillow reads 16-bit colour.

    Raises:
        ValueError: its pixels have 32 bits, and nothing says which of their values is white.
    """
    if picture.mode in ("I", "F"):
        raise ValueError(f"its pixels have 32 bits (mode {picture.mode}): save it with 8 or 16 bits a colour")
    if picture.mode.startswith("I;16"):  # Pillow's own conversion makes all from 255 on white
        picture = picture.convert("I").point(lambda value: value / 256).convert("L")
    return picture.convert("RGB")
