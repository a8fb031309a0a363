"""Copies of videos of runs for the players of the page."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from postgen.apps.runs import Sample

_LARGEST = 2**26
"""Bytes of a video of samples that is played."""
_VIDEOS = 16
"""Copies that are kept."""


class SampleCopies:
    """Copies of videos of samples in a folder of this server: players are given nothing of the runs' own folders."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="postgen-samples-", dir=os.environ.get("GRADIO_TEMP_DIR"))

    def of(self, sample: Sample) -> str | None:
        """Return the copy of a sample's video; None where it has none, or too large a one."""
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
