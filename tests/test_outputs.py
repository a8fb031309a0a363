"""Outputs of a call: all files or none, never over another output or an input, and none after a signal."""

from __future__ import annotations

import os
import signal
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest

import postgen.compare
import postgen.generate
from benchmarks import faults_interrupts
from postgen import interrupts
from postgen.errors import UserError
from postgen.files import check_apart, check_place, discard_unfinished, files_of, named, replacing, replacing_all
from postgen.interrupts import Interrupted, held, stoppable
from tests.test_cli_errors import SMALL, names


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with files and folders that are in the way of outputs."""
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").write_text("x")
    for name in ("a.png", "b.json"):
        (tmp_path / name).mkdir()
    (tmp_path / "null.mp4").symlink_to("/dev/null")
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(postgen.generate, "load", lambda job: pytest.fail("the model was loaded"))
    monkeypatch.setattr(postgen.compare, "load", lambda job: pytest.fail("the model was loaded"))
    return tmp_path


PLACES = {
    "": "the name of the output is empty",
    " ": "the name of the output is empty",
    ".": "it is not the name of an output",
    "..": "it is not the name of an output",
    "...": "it is not the name of an output",
    "x/..": "it is not the name of an output",
    "/": "a slash at the end means a folder",
    "x.mp4/": "a slash at the end means a folder",
    "/dev/null": "it is a device, a pipe or a socket",
    "/dev/full": "it is a device, a pipe or a socket",
    "null.mp4": "it is a device, a pipe or a socket",
    "pipe.mp4": "it is a device, a pipe or a socket",
    "folder.mp4": "it is a folder",
    "a.mp4": "cannot write a.png: it is a folder",
    "b.mp4": "cannot write b.json: it is a folder",
    "file/x.mp4": "file is not a folder",
    "loop.mp4": "cannot write loop.mp4",
    f"{'n' * 252}.mp4": "File name too long",
    f"{'n' * 251}.mp4": ".json: File name too long",
    "x/" * 3000 + "x.mp4": "File name too long",
}


@pytest.mark.parametrize("command", ["generate", "compare"])
def test_odd_places_are_refused_before_anything_runs(cli: Any, tiny_wan: Path, odd: Path, command: str) -> None:
    more = ["--b", "steps=1"] if command == "compare" else []
    before = names(odd)
    for place, message in PLACES.items():
        done = cli(command, "a", "--model", tiny_wan, *SMALL, *more, "-o", place)
        assert (done.code, message in done.err, done.err.count("\n")) == (2, True, 1), (place[:50], done.err)
    assert names(odd) == before


def test_a_zero_byte_and_a_file_where_a_folder_is_meant(odd: Path) -> None:
    with pytest.raises(UserError, match="a name cannot contain a zero byte"):
        check_place(Path("x\0.mp4"))
    with pytest.raises(UserError, match="give the name of a folder"):
        check_place(Path("file"), folder=True)
    check_place(Path("folder.mp4"), folder=None)
    check_place(Path(f"{'n' * 251}.mp4"))
    assert named("frames/", folder=True) == Path("frames")
    assert named("~/x.mp4") == Path.home() / "x.mp4"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--from", "again.json", "-o", "again.mp4"], "again.json would overwrite again.json, which this call reads"),
        (["--from", "again.json", "-o", "link.mp4"], "link.json would overwrite again.json"),
        (["--from", "again.json", "-o", "hard.webm"], "hard.json would overwrite again.json"),
        (["--prompts", "prompts.json", "-o", "file.d/../prompts.mp4"], "prompts.json would overwrite prompts.json"),
        (["a", "-o", "x.json", "--format", "mp4"], "x.json would be two files of this call"),
        (["a", "-o", "x.png", "--format", "gif"], "x.png would be two files of this call"),
        (["a", "-o", "model/model_index.mp4"], "model_index.json would overwrite"),
        (["a", "--lora", "again.json", "-o", "again.mp4"], "again.json would overwrite again.json"),
    ],
)
def test_outputs_overwrite_neither_each_other_nor_what_is_read(
    cli: Any, tiny_wan: Path, odd: Path, words: list[str], message: str
) -> None:
    (odd / "again.json").write_text('{"settings": {"prompt": "a", "seed": 0}, "format": "mp4"}')
    (odd / "link.json").symlink_to("again.json")
    (odd / "hard.json").hardlink_to("again.json")
    (odd / "prompts.json").write_text('["a"]')
    (odd / "file.d").mkdir()
    (odd / "model").symlink_to(tiny_wan)
    before = names(odd)
    done = cli("generate", *words, "--model", "model", *SMALL)
    assert (done.code, message in done.err, done.err.count("\n")) == (2, True, 1), done.err
    assert names(odd) == before


def test_an_output_folder_holds_no_input(tmp_path: Path) -> None:
    picture = tmp_path / "frames" / "frame_00000.png"
    picture.parent.mkdir()
    picture.touch()
    with pytest.raises(UserError, match=r"frames would replace .*frame_00000\.png"):
        check_apart([picture.parent], [picture])
    check_apart([tmp_path / "x.mp4"], files_of(tmp_path))
    assert files_of(tmp_path) == [picture]


def test_all_files_appear_or_none(tmp_path: Path) -> None:
    old, new, blocked = (tmp_path / name for name in ("old", "new", "blocked"))
    old.write_text("before")

    def write(targets: list[Path]) -> None:
        with replacing_all(targets) as parts:
            for part in parts:
                part.write_text("after")
            assert old.read_text() == "before"

    blocked.mkdir()
    with pytest.raises(IsADirectoryError):
        write([old, new, blocked])
    assert (names(tmp_path), old.read_text()) == (["blocked", "old"], "before")
    blocked.rmdir()
    write([old, new, blocked])
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(names(tmp_path), "after")
    assert names(tmp_path) == ["blocked", "new", "old"]


def test_folders_that_were_made_for_nothing_go(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "a" / "b" / "x"):
        _ = 1 / 0
    assert names(tmp_path) == []


def test_a_comparison_that_fails_half_way_leaves_what_was_there(
    cli: Any, tiny_wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x-a.gif").write_text("before")
    calls = iter(range(2))

    def fail(*arguments: Any) -> Any:
        if next(calls):
            raise OSError(28, "No space left on device")
        return {}

    monkeypatch.setattr(postgen.generate, "portable", fail)
    done = cli("compare", "a", "--model", tiny_wan, "--b", "steps=1", "-o", tmp_path / "x.gif", *SMALL)
    assert (done.code, "No space left on device" in done.err) == (2, True), done.err
    assert (names(tmp_path), (tmp_path / "x-a.gif").read_text()) == (["x-a.gif"], "before")


@pytest.mark.parametrize("inside", [True, False], ids=["command", "library"])
def test_signals_wait_while_names_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: bool) -> None:
    """A signal between two renames arrives after the last rename."""
    rename = os.replace

    def renamed(*paths: Any) -> None:
        rename(*paths)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(os, "replace", renamed)
    targets = [tmp_path / "a", tmp_path / "b"]

    def write() -> None:
        with replacing_all(targets) as parts:
            for part in parts:
                part.touch()

    with pytest.raises(KeyboardInterrupt), stoppable() if inside else nullcontext():
        write()
    assert names(tmp_path) == ["a", "b"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_held_signal_follows_an_error() -> None:
    @held()
    def fail() -> None:
        signal.raise_signal(signal.SIGINT)
        raise ValueError

    with pytest.raises(KeyboardInterrupt) as raised:
        fail()
    assert isinstance(raised.value.__context__, ValueError)


def test_termination_is_raised_once_more_where_nobody_heeds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "_AGAIN", 0.05)
    before = [signal.getsignal(number) for number in interrupts.SIGNALS]
    with stoppable() as stop:
        with suppress(Interrupted):
            signal.raise_signal(signal.SIGTERM)
            pytest.fail("it was not raised")
        with pytest.raises(Interrupted):
            time.sleep(5)
        stop.end()
        signal.raise_signal(signal.SIGINT)
        assert stop.code == 143
    assert [signal.getsignal(number) for number in interrupts.SIGNALS] == before


def test_signals_that_are_ignored_stay_so() -> None:
    """The process ignores the signal, as under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable() as stop, held():
            signal.raise_signal(signal.SIGHUP)
        assert stop.number == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_stopped_command_removes_what_it_was_writing(tmp_path: Path) -> None:
    with replacing(tmp_path / "x") as part:
        part.touch()
        discard_unfinished()
        assert names(tmp_path) == []
        part.touch()
    assert names(tmp_path) == ["x"]


def test_what_could_not_be_made_is_forgotten(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError), replacing(tmp_path / "file" / "x"):
        pass
    discard_unfinished()
    assert names(tmp_path) == ["file"]


def test_the_benchmark_sees_what_is_left(tmp_path: Path) -> None:
    def found(old: bool = False) -> list[str]:
        return faults_interrupts._half(tmp_path, "generate", old=old)

    assert found() == []
    assert "absent" in found(old=True)[0]
    (tmp_path / "x.json").write_text("{")
    assert "broken" in found()[0]
    (tmp_path / "x.json").write_text(faults_interrupts.OLD)
    assert "half-written" in found(old=True)[0]
    (tmp_path / ".x.mp4.0.part").touch()
    assert "left: .x.mp4.0.part" in found()


def test_a_link_stays_and_what_it_names_is_written(tmp_path):
    real, gone = tmp_path / "real", tmp_path / "gone" / "x.txt"
    real.write_text("old")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "new").symlink_to("gone/x.txt")
    (tmp_path / "box").mkdir()
    (tmp_path / "folder").symlink_to("box")
    for name, target in (("link", real), ("new", gone)):
        with suppress(ZeroDivisionError), replacing(tmp_path / name) as part:
            part.write_text("half")
            raise ZeroDivisionError
        assert target.exists() == (target == real)
        with replacing(tmp_path / name) as part:
            part.write_text("whole")
        assert ((tmp_path / name).is_symlink(), target.read_text()) == (True, "whole")
    with replacing(tmp_path / "folder") as part:
        part.mkdir()
        (part / "0.png").write_text("a frame")
    assert (tmp_path / "folder").is_symlink()
    assert (tmp_path / "box" / "0.png").read_text() == "a frame"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["box", "folder", "gone", "link", "new", "real"]
    (tmp_path / "nowhere").symlink_to(real / "x")
    with pytest.raises(UserError, match="is not a folder"):
        check_place(tmp_path / "nowhere")


def test_a_stop_says_how_many_videos_are_made(cli: Any, tiny_wan: Path, tmp_path: Path, monkeypatch: Any) -> None:
    write, left = postgen.generate.write, [2]

    def stopping(*args: Any, **kwargs: Any) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        write(*args, **kwargs)

    monkeypatch.setattr(postgen.generate, "write", stopping)
    words = ["generate", "a", "--model", tiny_wan, "--guidance", "1", *SMALL, "-o", tmp_path / "x.gif", "--count"]
    done = cli(*words, "3")
    first, second = (tmp_path / f"x-00{n}.gif" for n in range(2))
    assert done.err.endswith(
        f"postgen: stopped; 2 of 3 videos were finished, {first} to {second}; the same command generates all of them"
        " again\n"
    )
    assert "none of 3 videos was finished, and no half-written file was left" in cli(*words, "3").err
    assert "postgen: stopped; no half-written file was left" in cli(*words, "1").err
    assert names(tmp_path) == [f"x-00{n}.{kind}" for n in range(2) for kind in ("gif", "json", "png")]
