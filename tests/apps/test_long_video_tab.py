"""The tab "Long video": videos that are made, stopped, continued and branched, in the history of the app."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from postgen.apps.jobs import Progress, Task
from postgen.apps.long_kept import KIND, MOST_POINTS, made_of
from postgen.apps.long_making import LongForm, adapters, begin_work, branch_work, go_on_work, request_of, schedule_of
from postgen.apps.settings import AppSettings
from postgen.apps.state import App
from postgen.errors import UserError
from postgen.video import probe, read_video
from postgen.worldweaver.adapter import save_adapter
from postgen.worldweaver.embedding import LevelEmbedder
from postgen.worldweaver.widen import widen_transformer

SIZE = {"steps": 6, "width": 32, "height": 32, "guidance": 1.0}
RATE = 16.0
"""Frames per second of Wan."""


@pytest.fixture(scope="module")
def runs(tiny_wan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of training runs; one of them has an adapter with depth."""
    from diffusers import WanPipeline

    folder = tmp_path_factory.mktemp("runs")
    pipe = WanPipeline.from_pretrained(tiny_wan)
    widen_transformer(pipe, ("depth",))
    settings = {"causal_block_size": 2, "num_inference_steps": 6, "ar_step": 2, "history_sizes": [3, 2]}
    save_adapter(pipe, folder / "weaver" / "adapter", LevelEmbedder.for_transformer(pipe), settings=settings)
    (folder / "other").mkdir()
    return folder


@pytest.fixture
def app(tiny_wan: Path, runs: Path, tmp_path: Path) -> Iterator[App]:
    made = App(AppSettings(outputs=tmp_path, runs=runs, model=str(tiny_wan), device="cpu", long_seconds=4.0))
    yield made
    made.close()


def form(app: App, **changes: Any) -> LongForm:
    words = {"prompt": "a ball", "model": app.model_names[0], "seconds": 2.0, "seed": 3, "numbers": SIZE}
    return LongForm(**{**words, **changes})


def ended(app: App, work: Any, watch: Callable[[Task, Progress], None] = lambda task, progress: None) -> Progress:
    task = app.jobs.submit("a long video", work)
    while not (progress := app.jobs.progress(task)).ended:
        watch(task, progress)
        time.sleep(0.005)
    return progress


def begun(app: App, **changes: Any) -> Any:
    progress = ended(app, begin_work(app, *request_of(app, form(app, **changes))))
    assert progress.state == "done", progress.error
    return made_of(app.history.get(progress.result))


def test_chunks_can_be_watched_while_they_are_made(app: App) -> None:
    seen: list[tuple[int, int]] = []

    def watch(task: Task, progress: Progress) -> None:
        if (growing := progress.preview) is not None and (not seen or seen[-1][0] != growing.frames):
            assert growing.video.is_relative_to(app.history.folder)
            assert growing.depth is not None
            seen.append((growing.frames, min(probe(path).frames for path in (growing.video, growing.depth))))

    asked = form(app, adapter="weaver/adapter", segments=[[1.0, "a cube"], [None, ""]])
    progress = ended(app, begin_work(app, *request_of(app, asked)), watch)
    assert progress.state == "done", progress.error
    assert len(seen) > 1
    assert all(written >= frames for frames, written in seen)
    made = made_of(app.history.get(progress.result))
    assert made.frames == 33
    assert made.growing.key == made.entry.id
    assert made.growing.depth is not None
    assert probe(made.growing.depth).frames == 33
    assert made.note["schedule"] == [[0, "a ball"], [16, "a cube"]]
    assert made.entry.poster.is_file()


def test_stopped_it_is_kept_and_goes_on_as_if_it_had_never_been_stopped(app: App) -> None:
    whole = begun(app)

    def stop(task: Task, progress: Progress) -> None:
        if progress.preview is not None and progress.preview.frames >= 9:
            app.jobs.finish_early(task.id)

    progress = ended(app, begin_work(app, *request_of(app, form(app))), stop)
    assert progress.state == "done", progress.error
    made = made_of(app.history.get(progress.result))
    assert 9 <= made.frames < 33
    rest = (33 - made.frames) / RATE
    assert ended(app, go_on_work(app, made.entry.id, rest)).state == "done"
    again = made_of(app.history.get(made.entry.id))
    assert again.frames == 33
    assert again.places.video.read_bytes() == whole.places.video.read_bytes()
    assert again.note["seconds"] == pytest.approx(33 / RATE, abs=1e-3)


def test_cancelled_a_new_one_leaves_nothing_and_one_that_goes_on_what_it_has(app: App) -> None:
    def cancel(task: Task, progress: Progress) -> None:
        if progress.preview is not None:
            app.jobs.cancel(task.id)

    assert ended(app, begin_work(app, *request_of(app, form(app))), cancel).state == "cancelled"
    assert [*app.history.folder.iterdir()] == []
    made = begun(app, seconds=1.0)
    assert (
        ended(app, go_on_work(app, made.entry.id, 2.0), cancel).state == "done"
    )  # a cancel of a continued video acts as a stop
    more = made_of(app.history.get(made.entry.id))
    assert made.frames < more.frames < made.frames + 32
    assert more.note["seconds"] == pytest.approx(more.seconds, abs=1e-3)


def test_a_branch_begins_with_the_frames_before_it_and_leaves_the_old_video(app: App) -> None:
    made = begun(app)
    before = made.places.video.read_bytes()
    frame = [*made.points][1]
    progress = ended(app, branch_work(app, made.entry.id, frame, 1.5, "a cone", 9))
    assert progress.state == "done", progress.error
    branch = made_of(app.history.get(progress.result))
    assert made.places.video.read_bytes() == before
    assert branch.frames >= frame + 24
    assert branch.note["schedule"] == [[0, "a ball"], [frame, "a cone"]]
    assert branch.note["seed"] == 9
    old, new = read_video(made.places.video), read_video(branch.places.video)
    assert torch.equal(new[:frame], old[:frame])
    assert not torch.equal(new[: len(old)], old[: len(new)])
    assert len(app.history.entries(KIND)) == 2


def test_a_branch_that_changes_nothing_is_the_old_video_to_the_bit(app: App) -> None:
    made = begun(app)
    frame = [*made.points][1]
    progress = ended(app, branch_work(app, made.entry.id, frame, (33 - frame) / RATE, "", None))
    assert progress.state == "done", progress.error
    branch = made_of(app.history.get(progress.result))
    assert torch.equal(read_video(branch.places.video), read_video(made.places.video))


def test_few_states_are_kept_of_a_long_video_the_first_and_the_last_among_them(app: App) -> None:
    made = begun(app, seconds=4.0)
    assert 3 < len(made.points) <= MOST_POINTS
    assert [*made.points][-1] == made.frames == 65


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seconds": 4.5}, "at most 4, got 4.5"),
        ({"seconds": None}, "above 0"),
        ({"seconds": float("nan")}, "above 0"),
        ({"prompt": 3}, "must be a text"),
        ({"prompt": " "}, "empty"),
        ({"seed": -1}, "the seed must be"),
        ({"model": "/etc"}, "no model of that name"),
        ({"adapter": "/etc"}, "no adapter of that name"),
        ({"adapter": "other"}, "no adapter of that name"),
        ({"numbers": {"width": 33.5}}, "width"),
        ({"segments": [[9.0, "a cube"]]}, "row 1 .* below 2, got 9"),
        ({"segments": [["soon", "a cube"]]}, "row 1"),
        ({"segments": [[None, ""], [1, " "]]}, "row 2 of the prompts has no prompt"),
        ({"segments": [[1, "a cube", "a cone"]]}, "no other values"),
        ({"segments": [["a cube"]]}, "row 1"),
        ({"segments": [[1, "a cube"], [1.01, "a cone"]]}, "row 2 .* change one"),
    ],
)
def test_what_is_wrong_is_said_before_the_queue(app: App, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        request_of(app, form(app, **changes))


def test_places_and_lengths_of_a_branch_are_those_of_the_server(app: App) -> None:
    made = begun(app)
    for frame in (2, "1", -1, None, "../../x"):
        with pytest.raises(UserError, match="cannot branch at that time"):
            branch_work(app, made.entry.id, frame, 1.0)
    with pytest.raises(UserError, match=r"at most 1\.9"):
        go_on_work(app, made.entry.id, 2.5)
    for id in ("../results", "", None, 3):
        with pytest.raises(UserError, match="no such result"):
            go_on_work(app, id, 1.0)
    assert [*adapters(app)] == ["weaver/adapter"]


def test_a_number_of_0_is_the_default_as_an_empty_field_is_0_in_the_browser(app: App) -> None:
    zeros = dict.fromkeys(("steps", "width", "height", "guidance"), 0)
    assert request_of(app, form(app, numbers=zeros)) == request_of(app, form(app, numbers={}))


def test_prompts_on_the_way_come_in_any_order() -> None:
    rows = [[3.0, " b "], ["1.5", "a"], [None, "  "], ["", ""], [], [float("nan"), ""], [3.5, "c", ""]]
    assert schedule_of("first", rows, 4.0, 8.0) == ((0, "first"), (12, "a"), (24, "b"), (28, "c"))


def test_no_event_of_the_tab_is_public(app: App) -> None:
    pytest.importorskip("gradio")
    from postgen.apps.demo import build

    page = build(app=app)
    assert any(block.elem_id == "long-players" for block in page.blocks.values())
    places = ("postgen.apps.tabs.long_video", "postgen.apps.tabs.earlier")
    ours = [fn for fn in page.fns.values() if fn.fn and getattr(fn.fn, "__module__", "") in places]
    assert len(ours) >= 7
    assert all(fn.api_visibility == "private" for fn in ours)
