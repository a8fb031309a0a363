"""Load test of the app: many jobs at once on a real server, checked for lost jobs and memory growth.

    python -m benchmarks.app_jobs

Several `gradio_client` users submit all their jobs at once. Some jobs are invalid and refused, some are cancelled
while they wait or run, some are abandoned by their caller, and some fail because their model has truncated weights.
Every other job must return a readable video of its own seed and prompt, and must be in the history exactly once.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped, unused-ignore]

from postgen import embedded_model
from postgen.errors import UserError
from postgen.video import read_video
from tests.apps.served import Served, serving

SEED = 24
USERS = 5
JOBS = {"make": 30, "invalid": 6, "fail": 4, "cancelled while it waits": 4, "cancelled while it runs": 3, "left": 3}
"""Kind of job -> number of jobs; their order is random with a fixed seed."""
FEW = {**dict.fromkeys(JOBS, 1), "make": 3}
"""Kinds and numbers of jobs for a short run."""
LEVEL = 3
"""Number of jobs before the first measurement of memory."""
SIZE = 64
PATIENCE = 600.0
"""Most seconds that a job may take, including the time in the queue."""
_LONG = 2000
"""Number of steps of a job that is cancelled while it runs."""
_BODIES = ("red ball", "blue cube", "green cylinder", "yellow ball", "purple cube")
_MOVES = ("rolls left", "rolls right", "falls", "stays still")
_WRONG: tuple[dict[str, Any], ...] = (
    {"prompt": ""},
    {"frames": 6},
    {"preset": "best"},
    {"plug_ins": {"enhance": "much"}},
    {"seed": -1},
    {"model": "no such model"},
    {"lora": "no such LoRA"},
)
# The command `postgen demo`, with a signal handler that runs the garbage collector before memory is measured.
_PROGRAM = (
    "import gc, signal, sys; signal.signal(signal.SIGUSR1, lambda *_: gc.collect())\n"
    "from postgen.cli import main; main(sys.argv[1:])"
)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """One planned job."""

    number: int
    kind: str
    words: dict[str, Any]
    """Arguments of `/generate`."""

    @property
    def user(self) -> int:
        """Number of the user who submits the job."""
        return self.number % USERS


@dataclass(kw_only=True)
class Ended:
    """Outcome of a job."""

    number: int
    kind: str
    user: int
    state: str
    """Final state on the server, or "refused" (before the queue), "left" (abandoned by its caller), "no answer"."""
    said: str = ""
    """Error message of the server."""
    cancelled_as: str = ""
    """State of the job when it was cancelled."""
    seconds: float = 0.0
    """Seconds from the submission to the end."""
    wrong: list[str] = field(default_factory=list)
    """Errors in the files of a finished job."""


def planned(counts: Mapping[str, int], broken: str) -> list[Wanted]:
    """Return jobs of these kinds in random order; `broken` is the name of a model that cannot be loaded."""
    draw = random.Random(SEED)
    kinds = [kind for kind, count in counts.items() for _ in range(count)]
    draw.shuffle(kinds)
    return [Wanted(number=n, kind=kind, words=_words(n, kind, broken)) for n, kind in enumerate(kinds)]


def _words(number: int, kind: str, broken: str) -> dict[str, Any]:
    words: dict[str, Any] = {
        "prompt": f"a {_BODIES[number % len(_BODIES)]} {_MOVES[number % len(_MOVES)]}",
        "seed": 1000 + number,
        **{"width": SIZE, "height": SIZE, "frames": (5, 9)[number % 2], "steps": 2 + number % 3},
        "guidance": (1.0, 4.0)[number // 2 % 2],
        "plug_ins": {"enhance": "2"} if number % 4 == 0 else {},
    }
    if kind == "invalid":
        return words | _WRONG[number % len(_WRONG)]
    if kind == "fail":
        return words | {"model": broken}
    return words | ({"steps": _LONG} if kind in ("cancelled while it runs", "left") else {})


def lost(rows: Sequence[Ended], history: Sequence[Mapping[str, Any]], wanted: Sequence[Wanted]) -> list[int]:
    """Return the numbers of the lost jobs: valid jobs, not cancelled, without the requested result.

    Args:
        rows: outcomes of the jobs. A valid job without a row is lost.
        history: results in the history of the server, with `seed` and `prompt`.
        wanted: all planned jobs.
    """
    listed = Counter((entry["seed"], entry["prompt"]) for entry in history)
    ended = {row.number: row for row in rows}
    found = []
    for one in wanted:
        if one.kind == "make":
            row = ended.get(one.number)
            there = listed[one.words["seed"], one.words["prompt"]] == 1
            if row is None or row.state != "done" or row.wrong or not there:
                found.append(one.number)
    return found


def unexpected(rows: Sequence[Ended], history: Sequence[Mapping[str, Any]], wanted: Sequence[Wanted]) -> list[str]:
    """Return descriptions of unexpected outcomes of invalid, failing, cancelled and abandoned jobs."""
    states = {"invalid": {"refused"}, "fail": {"failed"}, "left": {"left"}}
    # A waiting job may finish between the last check of its state and the cancel.
    states |= {"cancelled while it waits": {"cancelled", "done"}, "cancelled while it runs": {"cancelled"}}
    listed = {entry["seed"] for entry in history}
    ended = {row.number: row for row in rows}
    found = []
    for one in wanted:
        state = ended[one.number].state if one.number in ended else "no row"
        if one.kind != "make" and state not in states[one.kind]:
            found.append(f"job {one.number}, {one.kind}: {state}")
        if one.kind != "make" and state != "done" and one.words["seed"] in listed:
            found.append(f"job {one.number}, {one.kind}: {state}, and yet it is in the history")
    return found


@contextmanager
def server(folder: Path) -> Iterator[Served]:
    """Start `postgen demo` with the embedded model and a copy of it with truncated weights."""
    broken = folder / BROKEN
    shutil.copytree(embedded_model(), broken)
    (weights,) = (broken / "transformer").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-4096])
    words = ["demo", "--port", "0", "--outputs", folder / "outputs"]
    with serving(
        ["-c", _PROGRAM, *words, "--model", embedded_model(), "--model", broken], folder, seconds=PATIENCE
    ) as served:
        yield served


BROKEN = "cut-off"
"""Name of the folder of the model that cannot be loaded."""


def resources(process: psutil.Process) -> dict[str, float]:
    """Return memory (MB), threads, open files and CPU seconds of a process, after a garbage collection in it."""
    process.send_signal(signal.SIGUSR1)
    time.sleep(2)
    memory, times = process.memory_full_info(), process.cpu_times()
    return {
        "rss_mb": memory.rss / 1e6,
        "uss_mb": memory.uss / 1e6,
        "threads": process.num_threads(),
        "open_files": process.num_fds(),
        "cpu_seconds": times.user + times.system,
    }


class User(threading.Thread):
    """A user who submits all jobs at once, cancels some of them, and checks the results."""

    def __init__(self, url: str, jobs: Sequence[Wanted], downloads: Path, tell: Callable[[Ended], None]) -> None:
        super().__init__(daemon=True)
        self._url, self._jobs, self._downloads, self._tell = url, jobs, downloads, tell
        self.rows: list[Ended] = []

    def run(self) -> None:
        """Submit the jobs and wait for their outcomes."""
        from gradio_client import Client

        client = Client(self._url, verbose=False, download_files=str(self._downloads))
        began = time.monotonic()
        left = {job.number: (job, client.submit(**job.words, api_name="/generate")) for job in self._jobs}
        acted: dict[int, str] = {}
        while left and time.monotonic() - began < PATIENCE:
            for number, (wanted, call) in list(left.items()):
                if number not in acted and (stood := _act(client, wanted, call)):
                    acted[number] = stood
                if call.done():
                    row = ended(wanted, call, acted.get(number, ""))
                    row.seconds = round(time.monotonic() - began, 2)
                    self.rows.append(row)
                    self._tell(row)
                    del left[number]
            time.sleep(0.1)
        for wanted, _ in left.values():
            self.rows.append(Ended(number=wanted.number, kind=wanted.kind, user=wanted.user, state="no answer"))


def _act(client: Any, wanted: Wanted, call: Any) -> str:
    """Cancel a job if it has reached the state for its kind; return that state, or "" if it was not cancelled."""
    outputs = call.outputs() if wanted.kind in ("cancelled while it waits", "cancelled while it runs", "left") else []
    if not outputs:
        return ""
    stands = outputs[-1]
    if wanted.kind != "cancelled while it waits" and (stands["state"] != "running" or not stands["done"]):
        return ""
    if wanted.kind == "left":
        call.cancel()
    elif not client.predict(job=stands["job"], api_name="/cancel"):
        return ""
    return str(stands["state"])


def ended(wanted: Wanted, call: Any, cancelled_as: str) -> Ended:
    """Return the outcome of a finished call."""
    row = Ended(number=wanted.number, kind=wanted.kind, user=wanted.user, state="", cancelled_as=cancelled_as)
    outputs = call.outputs()
    left = wanted.kind == "left" and cancelled_as
    try:
        last = call.result(timeout=30)
        row.state = "left" if left else last["state"]
        if row.state == "done":
            row.wrong = wrong_with(last["result"], wanted.words)
    except Exception as error:  # the client raises errors of many types
        row.said = str(error)[:300]
        row.state = "left" if left else "failed" if outputs else "refused"
    return row


def wrong_with(result: Mapping[str, Any], words: Mapping[str, Any]) -> list[str]:
    """Return the differences between the downloaded files of a result and the request."""
    try:
        clip = read_video(result["video"])
        note = json.loads(Path(result["sidecar"]).read_text(encoding="utf-8"))
    except (UserError, OSError, ValueError, KeyError) as error:
        return [f"it cannot be read: {error}"]
    found = []
    if tuple(clip.shape) != (words["frames"], 3, words["height"], words["width"]):
        found.append(f"the video has the shape {tuple(clip.shape)}")
    if (note.get("seed"), note.get("prompt")) != (words["seed"], words["prompt"]):
        found.append(f"the sidecar has seed {note.get('seed')} and prompt {note.get('prompt')!r}")
    if note.get("settings", {}).get("num_inference_steps") != words["steps"]:
        found.append(f"the sidecar has {note.get('settings', {}).get('num_inference_steps')} steps")
    return found


def measured(folder: Path, *, tiny: bool = False) -> dict[str, Any]:
    """Start a server, run the jobs, and return their outcomes and the memory of the server.

    Args:
        folder: empty folder for the server and the downloads.
        tiny: whether to run few jobs.
    """
    with server(folder) as served:
        process = psutil.Process(served.process.pid)
        first = [Wanted(number=n, kind="make", words=_words(n, "make", "")) for n in range(-1 if tiny else -LEVEL, 0)]
        alone = _asked(served.url, first, folder)
        before, began = resources(process), time.monotonic()
        wanted = planned(FEW if tiny else JOBS, str(folder / BROKEN))
        rows = _asked(served.url, wanted, folder)
        seconds = time.monotonic() - began
        after, history = resources(process), _history(served.url)
        said = served.said()
    rows.sort(key=lambda row: row.number)
    for row in rows:
        row.said = without_places(row.said, folder)
    return {
        "jobs": len(wanted),
        "users": USERS,
        "by_kind": dict(Counter(one.kind for one in wanted)),
        "lost": lost([*alone, *rows], history, [*first, *wanted]),
        "unexpected": unexpected(rows, history, wanted),
        "wall_seconds": round(seconds, 1),
        "server_cpu_seconds": round(after["cpu_seconds"] - before["cpu_seconds"], 1),
        "after_first_jobs": {name: round(value, 1) for name, value in before.items()},
        "after_all_jobs": {name: round(value, 1) for name, value in after.items()},
        "memory_growth_mb": round(after["rss_mb"] - before["rss_mb"], 1),
        "tracebacks_of_the_server": said.count("Traceback (most recent call last)"),
        "rows": [vars(row) for row in rows],
    }


def _asked(url: str, wanted: Sequence[Wanted], folder: Path) -> list[Ended]:
    """Run all users at the same time, wait for them, and return the outcomes of their jobs."""
    count, lock = 0, threading.Lock()

    def tell(row: Ended) -> None:
        nonlocal count
        with lock:
            count += 1
            more = "; ".join([row.said, *row.wrong]).strip("; ")
            print(f"{count} of {len(wanted)}: job {row.number} ({row.kind}) {row.state} {more}".rstrip(), flush=True)

    users = [
        User(url, jobs, folder / f"downloads-{user}", tell)
        for user in range(USERS)
        if (jobs := [one for one in wanted if one.user == user])
    ]
    for each in users:
        each.start()
    for each in users:
        each.join()
    return [row for each in users for row in each.rows]


def without_places(text: str, folder: Path) -> str:
    """Return a message of the server without the paths of this machine's folders."""
    for place in (folder, Path(embedded_model()).parent):
        text = text.replace(f"{place}/", "")
    return text


def _history(url: str) -> list[dict[str, Any]]:
    from gradio_client import Client

    found: list[dict[str, Any]] = Client(url, verbose=False, download_files=False).predict(
        limit=500, api_name="/history"
    )
    return found


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        result = measured(Path(name), tiny=True)
    print({key: value for key, value in result.items() if key != "rows"})
