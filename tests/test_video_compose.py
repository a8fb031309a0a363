"""Contact sheets and clips side by side."""

import pytest
import torch
from PIL import Image

from postgen.video import VideoError, contact_sheet, side_by_side


def test_contact_sheet_shows_every_frame(tmp_path):
    clip = torch.stack([torch.full((3, 20, 30), index / 10) for index in range(11)])
    path = contact_sheet(clip, tmp_path / "sheet.png", columns=4, title="a title that is much longer than a row " * 3)
    with Image.open(path) as picture:
        colours = picture.getcolors(picture.width * picture.height)
        values = {red for _, (red, green, blue) in colours if red == green == blue}
        assert {round(25.5 * index) for index in range(11)} <= values
        assert picture.width == 4 * 36 + 6
        assert picture.height > 3 * 41
    assert [item.name for item in tmp_path.iterdir()] == ["sheet.png"]


def test_contact_sheet_of_a_long_clip_keeps_its_ends(tmp_path):
    clip = torch.stack([torch.full((3, 9, 9), index / 255) for index in range(200)])
    with Image.open(contact_sheet(clip, tmp_path / "s.png", limit=5)) as picture:
        row = [picture.getpixel((6 + 15 * column + 4, 6 + 15 + 4))[0] for column in range(5)]
    assert row == [0, 50, 100, 149, 199]
    kept = [0, 50, 100, 149, 199]
    told = contact_sheet(clip[kept], tmp_path / "told.png", indices=kept)
    assert told.read_bytes() == (tmp_path / "s.png").read_bytes()
    with pytest.raises(VideoError, match="the clip has 2 frames, got 1 indices"):
        contact_sheet(clip[:2], tmp_path / "t.png", indices=[0])
    for options in ({"columns": 0}, {"limit": 1}):
        with pytest.raises(VideoError, match="columns must be"):
            contact_sheet(clip, tmp_path / "t.png", **options)
    with pytest.raises(VideoError, match="the clip has no frame"):
        contact_sheet([], tmp_path / "t.png")


def test_side_by_side_pads_and_holds():
    left, right = torch.ones(2, 3, 4, 5), torch.full((4, 3, 6, 7), 0.4)
    joined = torch.stack(list(side_by_side(left, right, gap=2)))
    assert joined.shape == (4, 3, 6, 5 + 2 + 7)
    assert torch.equal(joined[3, :, :4, :5], left[1])
    assert not joined[:, :, 4:, :5].any()
    assert torch.equal(joined[..., 5:7], torch.ones(4, 3, 6, 2))
    assert torch.allclose(joined[..., 7:], right)
    with pytest.raises(VideoError, match="one of them has no frame"):
        next(side_by_side(left, []))
