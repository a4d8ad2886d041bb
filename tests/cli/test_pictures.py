"""Pictures as users have them, and what is no picture."""

import struct
import zlib

import pytest

pytest.importorskip("PIL")
pytest.importorskip("numpy")

import numpy
from PIL import Image

from eah.pictures import in_rgb, read_picture

GREY = numpy.linspace(0, 65535, 240).astype(numpy.uint16).reshape(12, 20)


def colours():
    return Image.fromarray(numpy.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=numpy.uint8))


def turned(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    colours().save(path, exif=exif)


def vast(path):
    """What no memory holds, as its header says."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    kind = "jpg" if mode in ("CMYK", "YCbCr") else "png"
    colours().convert(mode).save(tmp_path / f"a.{kind}")
    picture = read_picture(tmp_path / f"a.{kind}", upright=True)
    assert picture.mode == "RGB" and picture.size == (20, 12)


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_of_16_bits_the_upper_ones_are_kept(tmp_path, mode):
    picture = Image.frombytes(mode, (20, 12), GREY.astype("<u2" if mode == "I;16" else ">u2").tobytes())
    picture.save(tmp_path / "grey.tif")
    for one in (in_rgb(picture), read_picture(tmp_path / "grey.tif", upright=True)):
        assert (numpy.asarray(one) == (GREY >> 8)[..., None]).all()


def test_an_orientation_is_applied_on_demand(tmp_path):
    turned(tmp_path / "a.jpg")
    sizes = [read_picture(tmp_path / "a.jpg", upright=upright).size for upright in (True, False)]
    assert sizes == [(12, 20), (20, 12)]


def test_of_an_animation_the_first_picture(tmp_path):
    first = Image.new("RGB", (4, 4), "red")
    first.save(tmp_path / "a.gif", save_all=True, append_images=[Image.new("RGB", (4, 4), "blue")])
    assert read_picture(tmp_path / "a.gif", upright=True).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (vast, "decompression bomb"),
        (lambda path: path.write_bytes(b""), "cannot identify"),
        (lambda path: path.mkdir(), "Is a directory"),
        (lambda path: Image.fromarray(GREY.astype(numpy.int32)).save(path, "TIFF"), "its pixels have 32 bits (mode I)"),
        (lambda path: Image.fromarray(GREY.astype(numpy.float32)).save(path, "TIFF"), "32 bits (mode F)"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, make, named):
    path = tmp_path / "a.png"
    make(path)
    with pytest.raises(ValueError) as caught:
        read_picture(path, upright=True)
    assert str(caught.value).startswith(f"{path} is no picture that can be read: ") and named in str(caught.value)
    with pytest.raises(ValueError, match=r"there is no picture none\.png"):
        read_picture("none.png", upright=False)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", ["png", "jpg", "gif", "tif", "bmp", "webp"])
def test_a_file_that_ends_too_early_is_named(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    colours().save(path)
    whole = path.read_bytes()
    for length in range(1, len(whole), 37):
        path.write_bytes(whole[:length])
        try:
            read_picture(path, upright=True)  # of some, Pillow makes up what is missing
        except ValueError as error:
            assert str(path) in str(error)
