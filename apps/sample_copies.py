"""Copies of the sample videos of training runs, for the players of the page."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from postgen.apps.runs import Sample

_LARGEST = 2**26
"""Largest sample video that the page plays, in bytes."""
_VIDEOS = 16
"""Number of copies that are kept."""


class SampleCopies:
    """Copies of sample videos in a temporary folder of this server, so that players never open folders of the runs."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="postgen-samples-", dir=os.environ.get("GRADIO_TEMP_DIR"))

    def of(self, sample: Sample) -> str | None:
        """Return the path of the copy of a sample's video; None if the sample has no video or a too large one."""
        if sample.video is None:
            return None
        with suppress(OSError):
            found = sample.video.stat()
            if found.st_size > _LARGEST:
                return None
            said = f"{sample.video}\0{found.st_mtime_ns}\0{found.st_size}"
            copy = Path(self._folder.name) / f"{hashlib.sha256(said.encode()).hexdigest()[:24]}.mp4"
            if not copy.is_file():
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(sample.video, copy)
                self._drop()
            return str(copy)
        return None

    def _drop(self) -> None:
        old = sorted(Path(self._folder.name).iterdir(), key=lambda path: path.stat().st_mtime)
        for path in old[:-_VIDEOS]:
            path.unlink(missing_ok=True)
