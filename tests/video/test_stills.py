"""Pictures of users: rotated, with 16 bits, transparent, with colour profiles."""

import re
import struct

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from postgen.sampling.conditions import load_image
from postgen.video import VideoError, probe, read_picture, read_video, rgb_picture
from tests.video.making import make

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def quarters():
    """Return a picture of width 6 and height 4 whose quarters are red, blue / black, white."""
    picture = Image.new("RGB", (6, 4), RED)
    picture.paste(BLUE, (3, 0, 6, 2))
    picture.paste((0, 0, 0), (0, 2, 3, 4))
    picture.paste(WHITE, (3, 2, 6, 4))
    return picture


# EXIF orientation -> the operation on the stored picture that makes it upright.
TURNS = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
    8: lambda x: np.rot90(x),
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_pictures_are_turned_as_they_say(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    quarters().save(tmp_path / f"a.{suffix}", exif=exif)
    shown = read_picture(tmp_path / f"a.{suffix}")
    expected = TURNS[orientation](np.asarray(quarters()))
    assert np.array_equal(np.asarray(shown), expected)
    if suffix == "png":
        assert (probe(tmp_path).height, probe(tmp_path).width) == expected.shape[:2]
        assert torch.equal(read_video(tmp_path)[0], torch.tensor(expected.copy()).permute(2, 0, 1) / 255)


def test_a_telephones_jpeg_and_a_picture_in_memory(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 32), RED).save(tmp_path / "a.jpg", exif=exif)
    assert read_picture(tmp_path / "a.jpg").size == (32, 64)
    with Image.open(tmp_path / "a.jpg") as picture:
        assert rgb_picture(picture).size == (32, 64)
        assert load_image(picture, 64, 32).shape == (3, 64, 32)
    faint = Image.new("RGBA", (4, 4), (255, 0, 0, 51))
    assert load_image(faint, 4, 4)[:, 0, 0].tolist() == pytest.approx([1, 0.8, 0.8])


@pytest.mark.parametrize("name", ["a.png", "little.tif", "big.tif"])
def test_sixteen_bits_are_rounded_to_eight(tmp_path, name):
    values = np.array([[0, 128, 129, 0x8080, 65535]], dtype=np.uint16)
    if name == "big.tif":
        values = values.astype(">u2")
    picture = Image.frombytes("I;16B" if name == "big.tif" else "I;16", (5, 1), values.tobytes())
    picture.save(tmp_path / name)
    assert np.asarray(read_picture(tmp_path / name))[0].tolist() == [[v] * 3 for v in (0, 0, 1, 128, 255)]


def test_sixteen_bits_of_colour(tmp_path):
    path = make(tmp_path / "a.png", "-frames:v", "1", "-pix_fmt", "rgb48be", source="color=c=0x40A0C0:s=8x8")
    assert all(abs(a - b) <= 2 for a, b in zip(read_picture(path).getpixel((1, 1)), (64, 160, 192), strict=True))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA", "L", "RGB", "1"])
def test_what_is_transparent_lies_on_white(mode):
    if mode in ("RGBA", "LA", "PA"):
        picture = Image.new("RGBA", (2, 1), (0, 0, 0, 0)).convert(mode)
        picture.putalpha(Image.frombytes("L", (2, 1), bytes((0, 255))))
    else:  # declare one colour transparent
        picture = Image.new("RGB", (2, 1), "white").convert(mode)
        black = {"RGB": (0, 0, 0), "P": 5}.get(mode, 0)
        picture.putpalette(bytes(768)) if mode == "P" else None
        picture.paste(black, (0, 0, 2, 1))
        picture.putpixel((1, 0), {"RGB": (9, 9, 9), "P": 6}.get(mode, 1 if mode == "1" else 9))
        picture.info["transparency"] = black
    shown = rgb_picture(picture)
    assert shown.mode == "RGB"
    assert shown.getpixel((0, 0)) == WHITE
    if mode != "1":
        assert max(shown.getpixel((1, 0))) <= 9


def test_half_transparent_palette_and_grey(tmp_path):
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.save(tmp_path / "0.png", transparency=bytes((0, 128)))
    Image.merge("LA", [Image.new("L", (2, 2), 0), Image.new("L", (2, 2), 128)]).save(tmp_path / "1.png")
    assert read_video(tmp_path)[:, :, 0, 0].mul(255).round().tolist() == [[255, 127, 127], [127, 127, 127]]


def test_cmyk(tmp_path):
    inks = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    inks.save(tmp_path / "a.tif")
    inks.save(tmp_path / "a.jpg", quality=100)
    for name in ("a.tif", "a.jpg"):
        assert all(abs(a - b) <= 3 for a, b in zip(read_picture(tmp_path / name).getpixel((5, 5)), RED, strict=True))


def test_colours_of_an_embedded_profile_become_srgb(tmp_path):
    # A profile of sRGB with swapped red and blue primaries, in which stored red means blue.
    plain = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = plain[:128] + plain[128:].replace(b"rXYZ", b"xXYZ", 1).replace(b"bXYZ", b"rXYZ", 1).replace(
        b"xXYZ", b"bXYZ", 1
    )
    for mode, name in (("RGB", "a.png"), ("RGBA", "b.png"), ("RGB", "c.jpg")):
        Image.new(mode, (16, 16), RED).save(tmp_path / name, icc_profile=swapped)
        assert all(abs(a - b) <= 3 for a, b in zip(read_picture(tmp_path / name).getpixel((4, 4)), BLUE, strict=True))
    Image.new("RGB", (4, 4), RED).save(tmp_path / "d.png", icc_profile=b"no profile")
    assert read_picture(tmp_path / "d.png").getpixel((0, 0)) == RED


@pytest.mark.parametrize(("mode", "name"), [("F", "a.tif"), ("I", "a.tif")])
def test_values_without_a_range_are_refused_by_name(tmp_path, mode, name):
    Image.new(mode, (4, 4), 1).save(tmp_path / name)
    with pytest.raises(VideoError, match=rf"cannot read the picture .*{name}: its values \(mode {mode}\)"):
        read_picture(tmp_path / name)


def test_broken_and_huge_pictures_are_one_line(tmp_path, monkeypatch):
    quarters().save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    cases = {"cut.png": data[: len(data) * 2 // 3], "text.png": b"text", "empty.png": b""}
    cases["header.png"] = data[:16] + struct.pack(">II", 0, 4) + data[24:]
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(VideoError, match=re.escape(f"cannot read the picture {tmp_path / name}")):
            read_picture(tmp_path / name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(VideoError, match="24 pixels"):
        read_picture(tmp_path / "a.png")


def test_frames_of_unequal_size_are_one_line(tmp_path):
    for index, size in enumerate([(4, 4), (4, 4), (6, 4)]):
        Image.new("RGB", size).save(tmp_path / f"{index}.png")
    with pytest.raises(VideoError, match="frame 2 is 6x4, the frames before it are 4x4"):
        read_video(tmp_path)
