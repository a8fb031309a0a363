"""Storage of uploaded first frames: a picture is kept as long as a job or a result uses it."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from postgen.apps.history import SIDECAR, History
from postgen.errors import UserError
from postgen.files import replacing
from postgen.reading import read_json


class Pictures:
    """The server's folder of first frames. Sidecars of results name these files, so a result can be made again.

    Args:
        folder: folder of the pictures, created with the first picture. The page cannot read it.
        history: the results.
    """

    def __init__(self, folder: Path, history: History) -> None:
        self.folder = folder
        self._history = history
        self._held: Counter[str] = Counter()
        self._lock = threading.Lock()

    def hold(self, picture: Any) -> Path:
        """Store a picture until `release` is called, and return its path.

        The file name is a hash of the content, so equal pictures share one file.

        Args:
            picture: a PIL image in RGB.

        Raises:
            UserError: the folder cannot be written.
        """
        size = f"{picture.width}x{picture.height}".encode()
        path = self.folder / f"{hashlib.sha256(size + picture.tobytes()).hexdigest()[:32]}.png"
        with self._lock:
            if not path.is_file():
                try:
                    with replacing(path) as part:
                        picture.save(part, "PNG")
                except OSError as error:
                    raise UserError(f"the server cannot keep the picture: {error.strerror or error}") from error
            self._held[path.name] += 1
        return path

    def release(self, path: Path) -> None:
        """End one `hold` of a picture; delete the file if no other `hold` and no result uses it."""
        with self._lock:
            self._held[path.name] -= 1
            self._tidy(path.name)

    def find(self, name: Any) -> Path | None:
        """Return the path of the stored picture with the file name in `name`, or None.

        Args:
            name: a value from a sidecar of any origin. Only its file name is used, so no other folder is opened.
        """
        path = self.folder / Path(str(name)).name
        return path if path.parent == self.folder and path.is_file() else None

    def remove_result(self, id: Any) -> None:
        """Delete a result, and its first frame if no other result uses it.

        Raises:
            UserError: no result has this id.
        """
        name = _named(self._history.get(id).folder)
        self._history.remove(id)
        if name is not None:
            with self._lock:
                self._tidy(name)

    def _tidy(self, name: str) -> None:
        if self._held[name] > 0:
            return
        del self._held[name]
        path = self.folder / name
        if path.parent == self.folder and all(_named(entry.folder) != name for entry in self._history.entries()):
            with suppress(OSError):
                path.unlink()


def _named(folder: Path) -> str | None:
    """Return the file name of a result's first frame; None if there is no first frame or no readable sidecar."""
    with suppress(UserError):
        note = read_json(folder / SIDECAR, "")
        settings = note.get("settings") if isinstance(note, dict) else None
        image = settings.get("image") if isinstance(settings, dict) else None
        return Path(image).name if isinstance(image, str) else None
    return None
