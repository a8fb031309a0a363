"""The benchmark of the app, with prepared answers instead of a server."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import app, app_paths, app_uploads, app_wheel, docs_tables
from benchmarks.app_jobs import FEW, JOBS, Ended, Wanted, lost, planned, unexpected, without_places, wrong_with
from benchmarks.app_tries import Places, tries
from benchmarks.gates import read_result
from postgen.video import write_video


def test_jobs_are_drawn_alike_each_time() -> None:
    jobs = planned(JOBS, "broken")
    assert jobs == planned(JOBS, "broken")
    assert len(jobs) == 50
    assert Counter(one.kind for one in jobs) == JOBS
    seeds = [one.words["seed"] for one in jobs if one.kind == "make"]
    assert len(set(seeds)) == 30
    assert all(one.words["model"] == "broken" for one in jobs if one.kind == "fail")
    assert len(planned(FEW, "broken")) == 8


@pytest.fixture
def wanted() -> list[Wanted]:
    """Three valid jobs, and one job of each other kind."""
    kinds = ("make", "make", "make", "invalid", "fail", "cancelled while it waits", "cancelled while it runs", "left")
    return [Wanted(number=n, kind=kind, words={"seed": n, "prompt": f"p{n}"}) for n, kind in enumerate(kinds)]


def rows_of(wanted: list[Wanted], **changed: str) -> list[Ended]:
    states = {"make": "done", "invalid": "refused", "fail": "failed", "left": "left"}
    found = [
        Ended(number=one.number, kind=one.kind, user=0, state=states.get(one.kind, "cancelled")) for one in wanted
    ]
    for row in found:
        row.state = changed.get(f"n{row.number}", row.state)
    return found


def listed(*numbers: int) -> list[dict[str, Any]]:
    return [{"seed": n, "prompt": f"p{n}"} for n in numbers]


def test_a_job_is_lost_where_any_part_of_it_is(wanted: list[Wanted]) -> None:
    rows = rows_of(wanted)
    assert lost(rows, listed(0, 1, 2), wanted) == []
    assert lost(rows, listed(0, 2), wanted) == [1]
    assert lost(rows, listed(0, 1, 1, 2), wanted) == [1]
    assert lost(rows, [*listed(0, 1), {"seed": 2, "prompt": "p1"}], wanted) == [2]
    assert lost(rows[1:], listed(0, 1, 2), wanted) == [0]
    for state in ("failed", "no answer", "cancelled", "refused"):
        assert lost(rows_of(wanted, n2=state), listed(0, 1, 2), wanted) == [2]
    rows[0].wrong.append("it cannot be read")
    assert lost(rows, listed(0, 1, 2), wanted) == [0]


def test_what_else_goes_wrong_is_told(wanted: list[Wanted]) -> None:
    assert unexpected(rows_of(wanted), listed(0, 1, 2), wanted) == []
    assert unexpected(rows_of(wanted, n5="done"), listed(0, 1, 2, 5), wanted) == []
    assert unexpected(rows_of(wanted, n3="done"), listed(0, 1, 2), wanted) == ["job 3, invalid: done"]
    (told,) = unexpected(rows_of(wanted), listed(0, 1, 2, 7), wanted)
    assert told == "job 7, left: left, and yet it is in the history"
    assert len(unexpected(rows_of(wanted)[:4], listed(0, 1, 2), wanted)) == 4


def test_files_of_a_result_are_held_against_what_was_asked(tmp_path: Path) -> None:
    video, sidecar = tmp_path / "a.mp4", tmp_path / "a.json"
    write_video(video, torch.rand(5, 3, 32, 32), fps=8)
    note = {"seed": 3, "prompt": "a ball", "settings": {"num_inference_steps": 2}}
    sidecar.write_text(json.dumps(note))
    words = {"seed": 3, "prompt": "a ball", "steps": 2, "frames": 5, "width": 32, "height": 32}
    result = {"video": str(video), "sidecar": str(sidecar)}
    assert wrong_with(result, words) == []
    for change in ({"seed": 4}, {"prompt": "a cube"}, {"steps": 3}, {"frames": 9}, {"width": 64}):
        assert len(wrong_with(result, words | change)) == 1
    video.write_bytes(video.read_bytes()[:-900])
    assert wrong_with(result, words)[0].startswith("it cannot be read")
    sidecar.write_text("{")
    assert len(wrong_with(result, words)) == 1


def test_enough_ways_to_read_a_file_are_tried(tmp_path: Path) -> None:
    uploads = tmp_path / "uploads"
    places = Places(
        outputs=tmp_path / "outputs",
        private=tmp_path / "private.txt",
        lora=tmp_path / "lora.safetensors",
        runs=tmp_path / "runs",
        model=tmp_path / "model",
        uploads=uploads,
        other=uploads / "digest" / "somebodys.mp4",
    )
    found = tries(places)
    assert len({one.what for one in found}) == len(found) >= 80
    assert all(sum((bool(one.address), bool(one.call), bool(one.name))) == 1 for one in found)
    # The full path of an upload gives access to it, so the tries may use its file name only.
    assert not [one for one in found if str(places.other) in one.address + str(one.data)]
    assert sum(str(places.private) in one.address + str(one.data) for one in found) >= 20


def test_a_line_of_a_hidden_file_is_found() -> None:
    lines = {"private.txt": b"hidden-1", "passwd": b"root:x:0:0"}
    assert app_paths.read(b'{"detail": "hidden-1"}', lines) == ["private.txt"]
    assert app_paths.read(b"a page", lines) == []


def test_an_upload_elsewhere_is_found(tmp_path: Path) -> None:
    (tmp_path / "temporary" / "uploads").mkdir(parents=True)
    (tmp_path / "temporary" / "uploads" / "escaped.txt").touch()
    assert app_paths._escaped(tmp_path) == []
    (tmp_path / "escaped.txt").touch()
    assert app_paths._escaped(tmp_path) == [tmp_path / "escaped.txt"]


def test_files_on_the_disk_are_counted_without_the_log(tmp_path: Path) -> None:
    (tmp_path / "server.log").write_text("a line")
    (tmp_path / "temporary").mkdir()
    before = app_uploads.on_disk(tmp_path)
    assert before == {}
    assert app_uploads.left_over(tmp_path, before) == []
    (tmp_path / "temporary" / "a").write_bytes(b"123")
    assert app_uploads.on_disk(tmp_path) == {"temporary/a": 3}


def test_gates_of_numbers() -> None:
    fine = {"an_allowed_one": {"scored": True}, "page_after_all": 200, "got_through": [], "left_on_disk": []}
    assert app_uploads.stopped(fine) == 1
    for change in ({"got_through": ["a"]}, {"left_on_disk": ["a"]}, {"page_after_all": 0}):
        assert app_uploads.stopped(fine | change) == 0
    steps = [{"what": name, "wrong": ""} for name in app_wheel.STEPS]
    assert (app_wheel.works({"rows": steps}), app_wheel.works({"rows": steps[1:]})) == (1, 0)
    assert app_wheel.works({"rows": [*steps[1:], {"what": steps[0]["what"], "wrong": "it failed"}]}) == 0
    parts: dict[str, dict[str, Any]] = {
        "start": {"wall_seconds": 15.0},
        "jobs": {"lost": [], "memory_growth_mb": 99.0},
        "paths": {"readable": [], "tries": 20, "result_is_given": True},
        "uploads": {"stopped": 1.0},
        "wheel": {"works": 1.0},
    }
    assert [row["ok"] for row in app.gates(parts)] == [True] * 6
    assert [row["value"] for row in app.gates({})] == [None] * 6
    missed = {name: part.copy() for name, part in parts.items()}
    missed["start"]["wall_seconds"], missed["jobs"]["lost"] = 15.1, [3]
    missed["jobs"]["memory_growth_mb"], missed["paths"]["readable"] = 101.0, [{"what": "a"}]
    missed["uploads"]["stopped"] = missed["wheel"]["works"] = 0.0
    assert [row["ok"] for row in app.gates(missed)] == [False] * 6
    # The gate has no value if the public result is not readable either, or if there were too few tries.
    for change in ({"result_is_given": False}, {"tries": 19}):
        gates = {row["name"]: row["value"] for row in app.gates({**parts, "paths": {**parts["paths"], **change}})}
        assert gates["server_paths_readable"] is None


def test_a_try_is_no_result(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        app.main(["--tiny", "--output", str(app.RESULTS / "app.json")])
    assert "must not overwrite" in capsys.readouterr().err


def test_the_table_says_what_was_not_measured() -> None:
    lines = list(app.markdown({"parts": {"paths": {"tries": 90}}, "gates": app.gates({})}))
    assert len(lines) == 2 + 6
    assert sum("not measured yet" in line for line in lines) == 5
    assert "private files of the server that 90 tries could read" in lines[5]


def test_what_a_server_said_names_no_place(tmp_path: Path) -> None:
    assert (
        without_places(f"cannot load {tmp_path}/cut-off as a pipeline", tmp_path)
        == "cannot load cut-off as a pipeline"
    )


def test_the_page_has_the_numbers_of_the_result() -> None:
    page = app.PAGE.read_text(encoding="utf-8")
    assert docs_tables.filled(page, {"app": app.markdown(read_result("app"))}) == page
