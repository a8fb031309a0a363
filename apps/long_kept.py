"""Files of a long video in the history: the video, its settings, its last state, and states to branch from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from postgen.apps.history import Entry
from postgen.apps.making import shown_model
from postgen.errors import UserError, is_number
from postgen.files import replacing
from postgen.reading import read_json
from postgen.video import probe

if TYPE_CHECKING:
    from postgen.generate_long import LongVideo
    from postgen.long_files import Places

KIND = "long"
"""Kind of the results in the history."""
VIDEO, NOTE, POINTS = "long.mp4", "note.json", "points"
"""Names of the video, of the JSON file with its settings, and of the folder of states to branch from."""
MOST_POINTS = 8
"""Largest number of kept states per video; they are spread evenly over the video."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Growing:
    """The part of a long video that can be watched; `Progress.preview` while the video is being made."""

    video: Path
    depth: Path | None
    frames: int
    fps: float
    key: str
    """Key of the players: id of the history entry."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LongMade:
    """A long video in the history."""

    entry: Entry
    note: Mapping[str, Any]
    frames: int

    @property
    def growing(self) -> Growing:
        """The whole video, for the players."""
        depth = self.places.depth
        return Growing(
            video=self.places.video,
            depth=depth if depth.is_file() else None,
            frames=self.frames,
            fps=float(self.note["fps"]),
            key=self.entry.id,
        )

    @property
    def seconds(self) -> float:
        """Length of the video in seconds."""
        return self.frames / float(self.note["fps"])

    @property
    def places(self) -> Places:
        """Paths of the video's files."""
        return places_in(self.entry.folder)

    @property
    def points(self) -> dict[int, Path]:
        """Folders of states to branch from, by the number of frames before the branch."""
        return points_in(self.entry.folder)


def made_of(entry: Entry) -> LongMade:
    """Read a long video from the history.

    Raises:
        UserError: a file of the video is missing or damaged.
    """
    from postgen.worldweaver.state import HEAD

    note = read_json(entry.file(NOTE), "this long video cannot be read")
    places = places_in(entry.folder)
    if not isinstance(note, dict) or not _is_sound(note):
        raise UserError("this long video cannot be read: its settings file was not written by postgen, or is damaged")
    entry.file(places.video.name)
    if not (places.state / HEAD).is_file():
        raise UserError("the state of this long video has been removed: reload the page")
    return LongMade(entry=entry, note=note, frames=probe(places.video).frames)


def _is_sound(note: Mapping[str, Any]) -> bool:
    fps, schedule = note.get("fps"), note.get("schedule")
    if not is_number(fps) or not float(fps or 0) > 0 or not isinstance(schedule, list) or not schedule:
        return False
    return all(isinstance(row, list) and len(row) == 2 and is_number(row[0]) and row[0] >= 0 for row in schedule)


def keep_point(video: LongVideo, folder: Path, frames: int) -> None:
    """Save the state after a chunk for branches, if possible without the decoder caches, which can be recomputed.

    Args:
        video: the video; its last state is on disk.
        folder: folder of the result.
        frames: number of frames before the branch.
    """
    from postgen.worldweaver.state import RolloutState

    state = RolloutState.load(video.places.state)
    with suppress(UserError):
        state = state.light()
    state.save(folder / POINTS / f"{frames:06d}")
    points = points_in(folder)
    if len(points) > MOST_POINTS:
        import shutil

        for place in [*points][1:-1:2]:
            shutil.rmtree(points[place], ignore_errors=True)


def points_in(folder: Path) -> dict[int, Path]:
    """Return the folders of states to branch from, by the number of frames before the branch."""
    from postgen.worldweaver.state import HEAD

    found = sorted(path for path in (folder / POINTS).glob("*") if (path / HEAD).is_file() and path.name.isdigit())
    return {int(path.name): path for path in found}


def note_down(video: LongVideo, folder: Path) -> None:
    """Write the JSON file with the settings that the page shows for the video."""
    config, request = video.request.config, video.request
    note = {
        "prompt": request.schedule[0][1],
        "schedule": [list(entry) for entry in request.schedule],
        "seed": config.seed,
        "model": shown_model(config.model),
        "adapter": None if request.adapter_folder is None else request.adapter_folder.name,
        "fps": video.rate,
        "seconds": round(video.seconds, 3),
    }
    with replacing(folder / NOTE) as part:
        part.write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")


def places_in(folder: Path) -> Places:
    """Return the paths of a long video's files."""
    from postgen.long_files import Places

    base = folder / Path(VIDEO).stem
    return Places(
        video=folder / VIDEO,
        depth=base.with_name(f"{base.name}-depth{Path(VIDEO).suffix}"),
        sheet=base.with_suffix(".png"),
        state=base.with_suffix(".state"),
        kind="mp4",
    )
