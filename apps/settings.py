"""What the app is started with. Light to import."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from postgen.apps.hosts import check_names, is_own
from postgen.errors import UserError, check_number, shown
from postgen.families.loading import check_device_name
from postgen.families.model_folder import DTYPES
from postgen.families.offload import OFFLOADS

LOCAL = "127.0.0.1"
"""Where the app listens where nothing else is said: this machine alone can reach it."""
OUTPUTS = "postgen-videos"
"""Folder for what is made, in the folder where the app is started."""
RESULTS = "results"
"""Folder of what was made, inside the folder of outputs: the page can read everything in it."""
THEMES = ("system", "light", "dark")
"""Colours of the page: what the browser's system says, or always one of the two."""

_LIMITS: dict[str, tuple[float, float]] = {
    "port": (0, 65535),
    "upload_bytes": (1024, 2**36),
    "upload_pixels": (1024, 2**34),
    "waiting": (0, 10_000),
    "at_once": (1, 64),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class AppSettings:
    """The app: its models, its folders, who reaches it, and how much it takes.

    Raises:
        UserError: a setting that is none, an address that others can reach without `auth`, no such folder.
    """

    model: str | None = None
    """The model that is chosen at first, a local diffusers folder or a hub id; None is the embedded model."""
    models: tuple[str, ...] = ()
    """Further models to choose from, beside `model` and the embedded one."""
    any_model: bool = False
    """Whether the page takes the name of a model as a text: a folder of this machine, or a hub id."""
    loras: tuple[str, ...] = ()
    """LoRA files, folders or hub ids to choose from."""
    outputs: Path = Path(OUTPUTS)
    """Where what is made is kept; made when it is missing."""
    runs: Path | None = None
    """Folder of training runs, which the page shows and whose LoRAs it offers; None shows none."""
    host: str = LOCAL
    """Address to listen at. Another one than this machine's own needs `auth`."""
    allow_hosts: tuple[str, ...] = ()
    """Further names under which the app answers, as of a proxy before it; `*` allows every one."""
    port: int = 7860
    """Port; 0 lets the system choose one."""
    auth: tuple[tuple[str, str], ...] = ()
    """Names and passwords of those who may use the app; nothing lets everybody in who reaches it."""
    upload_bytes: int = 64 * 2**20
    """Largest file that may be uploaded."""
    upload_seconds: float = 60.0
    """Longest video that may be uploaded."""
    upload_pixels: int = 2**28
    """Most pixels of all frames of a video that may be uploaded; a picture may have a sixteenth of them."""
    long_seconds: float = 120.0
    """Longest video that may be made chunk by chunk."""
    waiting: int = 50
    """Most jobs that wait; another one is refused."""
    at_once: int = 1
    """Jobs that run at a time; each has a model of its own in memory."""
    dtype: str = "auto"
    """As `GenerateConfig.dtype`."""
    device: str = "auto"
    """As `GenerateConfig.device`."""
    offload: str = "none"
    """As `GenerateConfig.offload`."""
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
        if self.outputs.exists() and not self.outputs.is_dir():
            raise UserError(f"the folder for outputs {self.outputs} is a file: name a folder")
        if self.runs is not None and not self.runs.is_dir():
            raise UserError(f"there is no folder of training runs {self.runs}: name one, or leave it out")

    @property
    def local(self) -> bool:
        """Whether only this machine reaches the app."""
        return is_own(self.host)

    def _check_people(self) -> None:
        if not self.host.strip():
            raise UserError(f"the host is empty: leave it out for {LOCAL}")
        check_names(self.allow_hosts)
        for pair in self.auth:
            if not isinstance(pair, tuple) or len(pair) != 2 or not all(isinstance(t, str) and t for t in pair):
                raise UserError("auth must be pairs of a name and a password, neither of them empty")
        if not self.local and not self.auth:
            raise UserError(
                f"{self.host} can be reached from other machines: give --auth USER:PASSWORD, or a file of such lines;"
                f" without it the app listens at {LOCAL} only"
            )


def read_auth(text: str) -> tuple[tuple[str, str], ...]:
    """Return the names and passwords of USER:PASSWORD, or of a file with such lines.

    Raises:
        UserError: neither a pair nor a readable file, a line without a colon, a name that comes twice.

    >>> read_auth("ann:secret:word")
    (('ann', 'secret:word'),)
    """
    lines, what = [text], "--auth"
    if ":" not in text or Path(text).expanduser().is_file():
        lines, what = _lines(text), f"the file {text}"
    pairs = []
    for number, line in enumerate(lines, 1):
        name, colon, password = line.partition(":")
        if not (colon and name and password):  # what stands there may be a password, so it is not shown
            raise UserError(f"{what}: line {number} is no USER:PASSWORD")
        pairs.append((name, password))
    if not pairs:
        raise UserError(f"{what} names nobody: write USER:PASSWORD into it, one a line")
    if len({name for name, _ in pairs}) < len(pairs):
        raise UserError(f"{what} names somebody twice: keep one line for each")
    return tuple(pairs)


def _lines(name: str) -> list[str]:
    from postgen.reading import read_text

    text = read_text(name, "--auth takes USER:PASSWORD, or a file with such lines")
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
