"""Settings of the app. This module imports no heavy library."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from postgen.apps.hosts import check_names, is_own
from postgen.errors import UserError, check_number, shown
from postgen.families.loading import check_device_name
from postgen.families.model_folder import DTYPES
from postgen.families.offload import OFFLOADS

LOCAL = "127.0.0.1"
"""Default address of the app, which only this machine can reach."""
OUTPUTS = "postgen-videos"
"""Default folder of outputs, inside the working directory."""
RESULTS = "results"
"""Folder of the results, inside the folder of outputs. The page can read every file in it."""
THEMES = ("system", "light", "dark")
"""Colour schemes of the page; "system" follows the setting of the user's system."""

_LIMITS: dict[str, tuple[float, float]] = {
    "port": (0, 65535),
    "upload_bytes": (1024, 2**36),
    "upload_pixels": (1024, 2**34),
    "waiting": (0, 10_000),
    "at_once": (1, 64),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class AppSettings:
    """Settings of the app: models, folders, access and limits.

    Raises:
        UserError: a value is invalid, a folder does not exist, or other machines can reach `host` and `auth` is empty.
    """

    model: str | None = None
    """Model that the page selects first: a local diffusers folder or a hub id; None is the embedded model."""
    models: tuple[str, ...] = ()
    """Further models that the page offers. It always offers the embedded model."""
    any_model: bool = False
    """Whether users may type the name of any model: a folder of this machine, or a hub id."""
    loras: tuple[str, ...] = ()
    """LoRA files, folders or hub ids that the page offers."""
    outputs: Path = Path(OUTPUTS)
    """Folder of results and uploaded first frames; created if it is missing."""
    runs: Path | None = None
    """Folder of training runs. The page shows the runs and offers their LoRAs; None disables both."""
    host: str = LOCAL
    """Address on which the server listens. An address that other machines can reach needs `auth`."""
    allow_hosts: tuple[str, ...] = ()
    """Further host names that the app accepts, such as the name of a reverse proxy; `*` accepts every name."""
    port: int = 7860
    """Port; 0 selects a free port."""
    auth: tuple[tuple[str, str], ...] = ()
    """Names and passwords of the users. Without any, everybody who can reach the server can use the app."""
    upload_bytes: int = 64 * 2**20
    """Largest size of an uploaded file, in bytes."""
    upload_seconds: float = 60.0
    """Longest duration of an uploaded video, in seconds."""
    upload_pixels: int = 2**28
    """Largest number of pixels in all frames of an uploaded video; the limit of a picture is a sixteenth of it."""
    long_seconds: float = 120.0
    """Longest duration of a video that is made chunk by chunk, in seconds."""
    waiting: int = 50
    """Largest number of waiting jobs; further jobs are refused."""
    at_once: int = 1
    """Number of jobs that run at the same time; each keeps its own model in memory."""
    dtype: str = "auto"
    """Same as `GenerateConfig.dtype`."""
    device: str = "auto"
    """Same as `GenerateConfig.device`."""
    offload: str = "none"
    """Same as `GenerateConfig.offload`."""
    theme: str = "system"
    """One of `THEMES`."""

    def __post_init__(self) -> None:
        for name, (least, most) in _LIMITS.items():
            check_number(name, getattr(self, name), least, most, whole=True)
        for name in ("upload_seconds", "long_seconds"):
            check_number(name, getattr(self, name), 0.1, 86_400)
        for name, known in (("dtype", DTYPES), ("offload", OFFLOADS), ("theme", THEMES)):
            if (value := getattr(self, name)) not in known:
                raise UserError(f"unknown {name} {shown(value)}. Known: {', '.join(known)}")
        check_device_name(self.device)
        self._check_people()
        for name, folder in (("outputs", self.outputs), ("runs", self.runs)):
            object.__setattr__(self, name, _as_path(name, folder))
        if self.outputs.exists() and not self.outputs.is_dir():
            raise UserError(f"outputs must be a folder, and {self.outputs} is a file: name another folder")
        if self.runs is not None and not self.runs.is_dir():
            raise UserError(f"there is no folder of training runs {self.runs}: name an existing one, or omit runs")

    @property
    def local(self) -> bool:
        """Whether only this machine can reach the app."""
        return is_own(self.host)

    def _check_people(self) -> None:
        if not self.host.strip():
            raise UserError(f"the host is empty: give an address, or omit it for {LOCAL}")
        check_names(self.allow_hosts)
        for pair in self.auth:
            if not isinstance(pair, tuple) or len(pair) != 2 or not all(isinstance(t, str) and t for t in pair):
                raise UserError("auth must be pairs of a name and a password that are not empty")
        if not self.local and not self.auth:
            raise UserError(
                f"other machines can reach {self.host}: give --auth USER:PASSWORD (or a file with such lines), or use"
                f" the default host {LOCAL}"
            )


def _as_path(name: str, folder: object) -> Path | None:
    # Programs may give a string, as everywhere else in postgen.
    if isinstance(folder, str) and folder:
        return Path(folder)
    if isinstance(folder, Path) or (folder is None and name == "runs"):
        return folder
    raise UserError(f"{name} must be the path of a folder, got {shown(folder)}")


def read_auth(text: str) -> tuple[tuple[str, str], ...]:
    """Return pairs of names and passwords.

    Args:
        text: `USER:PASSWORD`, or the path of a file with one such pair per line. Empty lines and lines that begin with
            `#` are ignored.

    Raises:
        UserError: the text is neither a pair nor a readable file, a line is not a pair, or a name occurs twice.

    >>> read_auth("ann:secret:word")
    (('ann', 'secret:word'),)
    """
    lines, what = [text], "--auth"
    if ":" not in text or Path(text).expanduser().is_file():
        lines, what = _lines(text), f"the file {text}"
    pairs = []
    for number, line in enumerate(lines, 1):
        name, colon, password = line.partition(":")
        if not (colon and name and password):  # the message does not quote the line: it may be a password
            raise UserError(f"{what}: line {number} must be USER:PASSWORD")
        pairs.append((name, password))
    if not pairs:
        raise UserError(f"{what} has no users: write one USER:PASSWORD per line")
    if len({name for name, _ in pairs}) < len(pairs):
        raise UserError(f"{what} has a name twice: keep one line per name")
    return tuple(pairs)


def _lines(name: str) -> list[str]:
    from postgen.reading import read_text

    text = read_text(name, f"--auth takes USER:PASSWORD, or a file with such lines, and {shown(name)} cannot be read")
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
