"""Interrupt generate, compare, score and train at random moments, and check the files that they leave.

    python -m benchmarks.faults_interrupts

Each command runs in its own process and folder and receives one signal, as of Ctrl-C (SIGINT) or SIGTERM. train
sometimes receives two. Half of the moments lie anywhere between the start and the end of an uninterrupted run; the
other half lie in its last part, in which files are written. A moment is a processor time of the process, so that a
busy machine does not shift it. For half of the runs that make files, older files with the same names exist.

Afterwards, the files of a call must be all complete or all as before, and no other file may exist. A table of scores
and a training run must continue to the result of an uninterrupted run. Run the benchmark on a system with POSIX
signals from the root of a checkout, because it uses the tiny trainer of the tests.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped, unused-ignore]
import yaml

from postgen.errors import UserError
from postgen.video import read_video

SEED = 19
INTERRUPTS = 50
PATIENCE = 60.0
"""Largest time in seconds between the signal and the end of a command."""
_AT_ONCE = 3
"""Number of commands that run at the same time."""
OLD = "as it was before\n"
CODES = {
    signal.SIGINT: (130, -signal.SIGINT),  # the signal itself ends Python if it comes before Python's handler is set
    signal.SIGTERM: (143, -signal.SIGTERM),
}
_CLIP = ("--size", "32x32", "--frames", "5", "--steps", "3")
_PROMPT = "a red ball rolls left"
_STEPS = 200
_RECIPE = {
    "method": "tests.training.tiny:TinyTrainer",
    **{"max_steps": _STEPS, "learning_rate": 1e-2, "ema_decay": 0.9, "save_steps": 5, "logging_steps": 4},
    **{"save_total_limit": 2, "disable_tqdm": True, "report_to": "none", "device": "cpu"},
}


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command under test."""

    words: Callable[[Path], list[str]]
    """Function that returns the arguments of the command for the folder in which it runs."""
    files: Sequence[str] = ()
    """Files that the command makes: all of them or none."""
    again: Sequence[str] = ()
    """Additional arguments when the interrupted command runs again to its end."""
    compared: Sequence[str] = ()
    """Files that must then equal those of an uninterrupted run, byte by byte."""


def _train(folder: Path) -> list[str]:
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**_RECIPE, "output_dir": str(folder / "run")}))
    return ["train", str(folder / "recipe.yaml")]


_END = f"run/checkpoint-{_STEPS}"
COMMANDS: Mapping[str, Command] = {
    "generate": Command(
        words=lambda folder: ["generate", _PROMPT, *_CLIP, "-o", str(folder / "x.mp4")],
        files=("x.mp4", "x.png", "x.json"),
    ),
    "compare": Command(
        words=lambda folder: ["compare", _PROMPT, *_CLIP, "--b", "guidance=1", "-o", str(folder / "x.webm")],
        files=[
            f"x{side}.{kind}" for side in ("", "-a", "-b") for kind in ("webm", "png", "json") if side + kind != "json"
        ],
    ),
    "score": Command(
        words=lambda folder: [
            *("score", str(folder.parent / "clips"), "--reward", "world(workers=2),motion_floor"),
            *("-o", str(folder / "scores.jsonl")),
        ],
        compared=("scores.jsonl",),
    ),
    "train": Command(
        words=_train,
        again=("--resume", "auto"),
        compared=[
            *(f"{_END}/{name}.safetensors" for name in ("weights", "ema", "optimizer", "rank-0")),
            *(f"{_END}/rank-0.json", "run/export/net.safetensors"),
        ],
    ),
}


@dataclass(kw_only=True)
class Outcome:
    """Result of one interrupt."""

    command: str
    signal: str
    after: float
    """Processor seconds of the process at the signal."""
    of: float
    """Processor seconds of an uninterrupted run."""
    second: float | None
    """Seconds between the first and the second signal; None if there is only one."""
    code: int | None
    """Exit code; None for a process that did not end."""
    seconds: float
    """Seconds from the first signal to the end of the process."""
    traceback: bool
    """Whether the command printed a traceback."""
    wrong: list[str]
    """Faults: files that are half-written, left over, or different from those of an uninterrupted run."""
    told: str = ""
    """Last line that the command printed."""


def outcomes(count: int = INTERRUPTS) -> list[Outcome]:
    """Interrupt the commands in turn, `count` times in all, with up to `_AT_ONCE` commands at the same time."""
    draw = random.Random(SEED)
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(_AT_ONCE) as pool:
        home = Path(name)
        _make_clips(home / "clips")
        whole = dict(zip(COMMANDS, pool.map(partial(_uninterrupted, home), COMMANDS), strict=True))

        def one(number: int, place: float, second: float | None, old: bool) -> Outcome:
            command = list(COMMANDS)[number % len(COMMANDS)]
            kind = (signal.SIGINT, signal.SIGTERM)[number // len(COMMANDS) % 2]
            low, high = ((0.0, 1.0), (0.7, 1.02))[number // (2 * len(COMMANDS)) % 2]
            folder = home / f"{number:02d}-{command}"
            moment = (low + place * (high - low)) * whole[command]
            found = _interrupted(folder, command, kind, moment, second if command == "train" else None, old=old)
            found.of = round(whole[command], 3)
            found.wrong += _different(folder, home / f"whole-{command}", command)
            print(f"{number + 1} of {count}: {asdict(found)}", flush=True)
            shutil.rmtree(folder)
            return found

        # Draw all random numbers here, in a fixed order, because the order of the threads is not fixed.
        drawn = [
            (n, draw.random(), draw.uniform(0, 0.1) if draw.random() < 0.5 else None, draw.random() < 0.5)
            for n in range(count)
        ]
        return list(pool.map(one, *zip(*drawn, strict=True)))


def _make_clips(folder: Path) -> None:
    for seed in range(6):
        words = ["generate", _PROMPT, *_CLIP, "--seed", str(seed), "-o", str(folder / f"{seed}.mp4")]
        _ended(_start(words, folder.parent))


def _uninterrupted(home: Path, command: str) -> float:
    """Run a command to its end without a signal; return its processor seconds.

    Raises:
        RuntimeError: if the command fails or leaves wrong files.
    """
    folder = home / f"whole-{command}"
    folder.mkdir()
    process = _start(COMMANDS[command].words(folder), folder)
    seconds = _wait(process, float("inf"))
    _ended(process)
    if wrong := _half(folder, command, old=False):
        raise RuntimeError(f"the command {command} leaves wrong files even without an interrupt: {wrong}")
    return seconds


def _wait(process: subprocess.Popen[bytes], seconds: float) -> float:
    """Wait until a process has used `seconds` of processor time or has ended; return the processor time it used."""
    used = 0.0
    try:
        watched = psutil.Process(process.pid)
        while process.poll() is None and used < seconds:
            times = watched.cpu_times()
            used = max(used, times.user + times.system)
            time.sleep(0.005)
    except psutil.Error:  # the process has just ended
        pass
    return used


def _start(words: Iterable[str], log: Path) -> subprocess.Popen[bytes]:
    # A program that is started in the background ignores SIGINT, and its children inherit this. So restore the
    # handler.
    with (log / "log").open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "postgen", *words],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )


def _ended(process: subprocess.Popen[bytes]) -> None:
    if code := process.wait():
        raise RuntimeError(f"the command {process.args!r} ended with exit code {code}")


def _interrupted(
    folder: Path, command: str, kind: signal.Signals, after: float, second: float | None, *, old: bool
) -> Outcome:
    # Start the command, with older files in place if `old`, and send one or two signals.
    folder.mkdir()
    for name in COMMANDS[command].files if old else ():
        (folder / name).write_text(OLD)
    process = _start(COMMANDS[command].words(folder), folder)
    after = _wait(process, after)
    sent = time.monotonic()
    process.send_signal(kind)
    if second is not None:
        time.sleep(second)
        process.send_signal(kind)
    try:
        code: int | None = process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        code = None
    # Check the files and the exit code.
    told = (folder / "log").read_text(errors="replace")
    wrong = _half(folder, command, old=old)
    if code not in (0, *CODES[kind]):
        wrong.append(f"the command ended with exit code {code}: {told[-300:]}")
    return Outcome(
        command=command,
        signal=kind.name,
        after=round(after, 3),
        of=0.0,
        second=second and round(second, 3),
        code=code,
        seconds=round(time.monotonic() - sent, 3),
        traceback="Traceback" in told,
        wrong=wrong,
        told=(told.strip().splitlines() or [""])[-1].replace(str(folder), "")[-160:],
    )


def _half(folder: Path, command: str, *, old: bool) -> list[str]:
    """Return the faults of the files in the folder: temporary files, half-written files, and other files left over."""
    own = COMMANDS[command]
    wrong = [f"left: {path.name}" for path in folder.rglob("*") if path.name.endswith((".part", ".old"))]
    wrong += [f"left: {path.name}" for path in folder.glob(".*") if not path.name.endswith((".part", ".old"))]
    if not own.files:
        return wrong
    states = {name: _state(folder / name) for name in own.files}
    before = {"old"} if old else {"absent"}
    if set(states.values()) not in (before, {"new"}):
        wrong.append(f"half-written: {states}")
    wrong += [f"left: {path.name}" for path in folder.iterdir() if path.name not in ("log", *own.files)]
    return wrong


def _state(path: Path) -> str:
    """Return the state of a file: "absent", "old", "new", or a description of its fault."""
    if not path.exists():
        return "absent"
    data = path.read_bytes()
    if data == OLD.encode():
        return "old"
    try:
        if path.suffix == ".json":
            json.loads(data)
        elif path.suffix in (".mp4", ".webm"):
            read_video(path)
        elif not data.endswith(b"IEND\xaeB`\x82"):
            return "cut short"
    except (ValueError, UserError) as error:
        return f"broken: {error}"
    return "new"


def _different(folder: Path, whole: Path, command: str) -> list[str]:
    """Run a command that can continue again to its end; return the files that differ from an uninterrupted run."""
    own = COMMANDS[command]
    if not own.compared:
        return []
    _ended(_start([*own.words(folder), *own.again], folder))
    return [
        f"other than uninterrupted: {name}"
        for name in own.compared
        if (folder / name).read_bytes() != (whole / name).read_bytes()
    ]


def half_written() -> tuple[int, list[dict[str, Any]]]:
    """Return the number of interrupts with faults, and the outcome of each interrupt."""
    found = outcomes()
    return sum(bool(one.wrong) for one in found), [asdict(one) for one in found]


if __name__ == "__main__":
    wrong, rows = half_written()
    print(f"{wrong} of {len(rows)} interrupts left wrong files or an unexpected exit code")
    sys.exit(bool(wrong))
