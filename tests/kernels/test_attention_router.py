"""The router: which backend it accepts and chooses, and which choices it stores. The candidates run on the CPU."""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from postgen.info import attention_backends
from postgen.kernels import dispatch
from postgen.kernels.attention.backends import MATH, SDPA, TIMED, Backend, Call, Result, last_backend
from postgen.kernels.attention.ops import attention, backend_names, router
from postgen.kernels.attention.router import Problem, Router, bucket
from postgen.kernels.attention.store import Store, cache_file
from tests.kernels.launches import relative_error


@pytest.fixture(autouse=True)
def every_warning_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "TOLD", set())


def delayed(name: str, seconds: float) -> Backend:
    """Return a backend that is correct and sleeps for `seconds` in each call."""

    def run(call: Call) -> Result:
        time.sleep(seconds)
        return MATH.run(call)

    return Backend(name=name, run=run, needs_gpu=False)


FAST, SLOW = delayed("fast", 0.0), delayed("slow", 0.05)


def _no_scale(call: Call) -> Result:
    return MATH.run(call._replace(scale=1.0))


def _no_lengths(call: Call) -> Result:
    return MATH.run(call._replace(key_lengths=None))


def _shifted_lse(call: Call) -> Result:
    out, lse = MATH.run(call)
    return out, None if lse is None else lse + 1


def _nan(call: Call) -> Result:
    out, lse = MATH.run(call)
    return out * torch.nan, lse


def _transposed(call: Call) -> Result:
    out, lse = MATH.run(call)
    return out.transpose(1, 2), lse


def _rounded(call: Call) -> Result:
    """Return attention with noise of the size of an 8-bit rounding error."""
    out, lse = MATH.run(call)
    return out + 0.02 * out.std() * torch.randn_like(out), lse


def _raises(call: Call) -> Result:
    raise ImportError("libcudart.so.12: cannot open shared object file\nmore")


def _loud(call: Call) -> Result:
    logging.getLogger("loud").warning("my C++ part was built for\nanother torch")
    warnings.warn("and so is the rest", stacklevel=1)
    return _raises(call)


def _only_small(call: Call) -> Result:
    if call.query.shape[1] > 100:
        raise RuntimeError("too many queries")
    return MATH.run(call)


def wrong(run: Callable[[Call], Result]) -> Backend:
    return Backend(name="wrong", run=run, needs_gpu=False)


def call_of(tokens: int = 50, *, lengths: bool = False, lse: bool = False, heads: int = 2) -> Call:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, tokens, each, 16) for each in (heads, 2, 2))
    return Call(query, key, value, 0.25, torch.tensor([3, tokens], dtype=torch.int32) if lengths else None, lse)


def test_the_fastest_is_taken_and_timed_once() -> None:
    mine = Router([SLOW, FAST])
    assert mine.choose(call_of()).name == "fast"
    times = mine.times[Problem.of(call_of())]
    assert times["fast"] < 50
    assert times.get("slow", 50) >= 50

    def no_clock(function: Callable[[], object], device: torch.device) -> float:
        raise AssertionError("this is known")

    mine._clock = no_clock
    assert mine.choose(call_of(49)).name == "fast"  # the same bucket of tokens


def test_the_median_of_turns_counts() -> None:
    # The first run of b and one later run of a are slow; the medians ignore both.
    times = iter([1.0, 1.2, 9.0, 1.0, 1.1, 0.9, 1.3, 1.0, 1.0, 0.9])
    mine = Router([replace(FAST, name="a"), replace(FAST, name="b")], clock=lambda function, device: next(times))
    assert mine.choose(call_of()).name == "b"
    assert mine.times[Problem.of(call_of())] == {"a": 1.1, "b": 1.0}


def test_the_hopeless_are_timed_once() -> None:
    runs: list[str] = []

    def counted(backend: Backend) -> Backend:
        def run(call: Call) -> Result:
            runs.append(backend.name)
            return backend.run(call)

        return replace(backend, run=run)

    Router([counted(FAST), counted(SLOW)]).choose(call_of())
    # The three runs are: a tiny input for the check, the warm-up at full size, and one timed run.
    assert runs.count("slow") == 3


@pytest.mark.parametrize("run", [_no_scale, _nan, _transposed, _rounded, _raises])
def test_a_backend_that_is_wrong_or_raises_is_never_taken(run: Callable[[Call], Result]) -> None:
    mine = Router([wrong(run), SLOW])
    assert mine.choose(call_of()).name == "slow"
    assert mine.why_not(wrong(run), call_of())


def test_what_is_tried_is_what_is_asked() -> None:
    mine = Router([wrong(_no_lengths), SLOW])
    assert mine.choose(call_of()).name == "wrong"
    assert mine.choose(call_of(lengths=True)).name == "slow"
    mine = Router([wrong(_shifted_lse), SLOW])
    assert mine.choose(call_of()).name == "wrong"
    assert mine.choose(call_of(lse=True)).name == "slow"


def test_reasons_name_what_is_wrong() -> None:
    mine = Router([SLOW])
    assert "its numbers are wrong (relative error" in str(mine.why_not(wrong(_no_scale), call_of()))
    assert mine.why_not(replace(wrong(_raises), name="x"), call_of()) == (
        "ImportError: libcudart.so.12: cannot open shared object file"
    )
    ungrouped = replace(FAST, name="y", takes_groups=False)
    assert mine.why_not(ungrouped, call_of(heads=4)) == "does not support grouped heads"
    assert mine.why_not(replace(FAST, name="z", needs_gpu=True), call_of()) == "needs a CUDA GPU"


def test_what_is_tried_is_not_heard(caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "libcudart" in str(Router([SLOW]).why_not(wrong(_loud), call_of()))
    assert not caplog.records
    logging.getLogger("loud").warning("afterwards everybody is")
    assert len(caplog.records) == 1


def test_trying_does_not_touch_the_random_numbers() -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    assert Router([SLOW]).why_not(FAST, call_of_zeros()) is None
    assert torch.equal(torch.rand(3), expected)


def call_of_zeros() -> Call:
    zeros = torch.zeros(1, 9, 2, 16)
    return Call(zeros, zeros, zeros, 0.25, None, False)


def test_where_nothing_can_run_a_last_resort_does() -> None:
    mine = Router([wrong(_raises)], [SDPA, MATH])
    assert mine.choose(call_of()).name == "sdpa"
    assert mine.choose(call_of(lse=True)).name == "math"


def test_what_fails_at_a_size_gives_way_with_a_warning() -> None:
    mine = Router([wrong(_only_small)], [SDPA, MATH])
    assert mine.choose(call_of(50)).name == "wrong"
    with pytest.warns(UserWarning, match="wrong is not used at this size: too many queries"):
        assert mine.choose(call_of(200)).name == "sdpa"


def test_what_fails_after_it_was_chosen_gives_way_for_good() -> None:
    mine = Router([wrong(_only_small)], [SDPA, MATH])
    assert mine.choose(call_of(100)).name == "wrong"
    assert mine.choose(call_of(9)).name == "wrong"
    call = call_of(110)
    assert bucket(110) == bucket(100)
    with pytest.warns(UserWarning, match="attention runs on sdpa, not on wrong: too many queries"):
        out, _ = mine.run(call)
    assert relative_error(out, MATH.run(call)[0]) < 1e-6
    assert mine.choose(call_of(100)).name == "sdpa"
    assert mine.choose(call_of(9)).name == "sdpa"


@pytest.mark.parametrize(
    ("limit", "declined", "reason"),
    [
        ({"fewest_keys": 2}, call_of(1), "needs 2 keys or more"),
        ({"gives_lse_with_lengths": False}, call_of(lengths=True, lse=True), "returns no LSE for calls with key"),
    ],
)
def test_a_call_that_is_declined_costs_a_backend_no_other(limit: dict[str, Any], declined: Call, reason: str) -> None:
    limited = replace(FAST, **limit)
    mine = Router([limited, SLOW])
    with pytest.warns(UserWarning, match=f"attention runs on slow, not on fast: {reason}"):
        out, _ = mine.run(declined, "fast")
    assert relative_error(out, MATH.run(declined)[0]) < 1e-6
    assert mine.choose(declined).name == "slow"
    for other in (call_of(lse=declined.lse), call_of(lengths=declined.key_lengths is not None)):
        assert mine.choose(other).name == "fast"


def test_no_last_resort_hides_its_error() -> None:
    with pytest.raises(ImportError, match="libcudart"):
        Router([], [wrong(_raises)]).run(call_of())


def test_a_named_backend_that_cannot_run_gives_one_warning() -> None:
    mine = Router([FAST, wrong(_raises)])
    assert mine.named("fast", call_of()).name == "fast"
    with pytest.warns(UserWarning, match="attention runs on fast, not on wrong: ImportError: libcudart"):
        assert mine.named("wrong", call_of()).name == "fast"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert mine.named("wrong", call_of()).name == "fast"
    with pytest.raises(ValueError, match=r"unknown attention backend 'none'\. Known: fast, wrong, sdpa, flash, math"):
        mine.named("none", call_of())


def test_a_backend_may_race_only_where_keys_are_masked() -> None:
    mine = Router([replace(FAST, races_without_lengths=False), SLOW])
    assert mine.choose(call_of()).name == "slow"
    assert mine.choose(call_of(lengths=True)).name == "fast"
    assert mine.named("fast", call_of()).name == "fast"


def test_problems_differ_where_kernels_do() -> None:
    calls = [call_of(), call_of(200), call_of(heads=4), call_of(lengths=True), call_of(lse=True)]
    assert len({str(Problem.of(call)) for call in calls}) == len(calls)
    half = call_of()
    half = half._replace(query=half.query.half(), key=half.key.half(), value=half.value.half())
    assert Problem.of(half) != Problem.of(call_of())
    assert Problem.of(call_of(49)) == Problem.of(call_of(64))


@pytest.fixture
def kept(tmp_path: Path) -> Callable[[], Router]:
    """Return a function that creates routers which share only the file, like routers in different processes."""
    return lambda: Router([SLOW, FAST], store=Store(tmp_path / "postgen" / "attention.json"))


def only_file(folder: Path) -> Path:
    (found,) = (path for path in folder.rglob("*") if path.is_file())
    return found


def test_another_process_finds_the_choice(kept: Callable[[], Router], tmp_path: Path) -> None:
    assert kept().choose(call_of()).name == "fast"
    row = next(iter(json.loads(only_file(tmp_path).read_text()).values()))
    assert row[str(Problem.of(call_of()))]["backend"] == "fast"
    assert str(Problem.of(call_of())) == "float32 B2 N64 M64 H2/2 D16"
    other = kept()
    assert other.choose(call_of()).name == "fast"
    assert not other.times  # nothing was timed


def test_choices_of_others_stay(kept: Callable[[], Router], tmp_path: Path) -> None:
    first, second = kept(), kept()
    first.choose(call_of())
    second.choose(call_of(200))
    first.choose(call_of(lse=True))
    (rows,) = json.loads(only_file(tmp_path).read_text()).values()
    assert len(rows) == 3


def test_a_kept_choice_is_tried_before_it_is_trusted(kept: Callable[[], Router], tmp_path: Path) -> None:
    kept().choose(call_of())
    broken = Router([SLOW, replace(wrong(_nan), name="fast")], store=Store(tmp_path / "postgen" / "attention.json"))
    assert broken.choose(call_of()).name == "slow"
    assert kept().choose(call_of()).name == "slow"


@pytest.mark.parametrize("content", ["", "{", "[1]", '"x"', '{"cpu": 3}', "\x00\xff"])
def test_a_corrupt_file_is_replaced(kept: Callable[[], Router], tmp_path: Path, content: str) -> None:
    file = tmp_path / "postgen" / "attention.json"
    file.parent.mkdir()
    file.write_bytes(content.encode("latin-1"))
    assert kept().choose(call_of()).name == "fast"
    other = kept()
    assert other.choose(call_of()).name == "fast"
    assert not other.times


@pytest.mark.parametrize("row", [3, {}, {"backend": 3}, {"backend": "gone"}])
def test_a_row_that_means_nothing_is_replaced(kept: Callable[[], Router], tmp_path: Path, row: object) -> None:
    kept().choose(call_of())
    file = only_file(tmp_path)
    place, rows = next(iter(json.loads(file.read_text()).items()))
    file.write_text(json.dumps({place: dict.fromkeys(rows, row)}))
    other = kept()
    assert other.choose(call_of()).name == "fast"
    assert other.times


@pytest.fixture
def blocked(tmp_path: Path) -> Path:
    """Return a folder path that not even root can create, because a file has that path."""
    (tmp_path / "file").write_text("x")
    return tmp_path / "file" / "postgen" / "attention.json"


def test_where_nothing_can_be_written_one_warning_says_so(blocked: Path) -> None:
    mine = Router([SLOW, FAST], store=Store(blocked))
    with pytest.warns(UserWarning, match="attention times are not saved"):
        mine.choose(call_of())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert mine.choose(call_of(200)).name == "fast"
        assert mine.choose(call_of()).name == "fast"


def test_versions_are_part_of_the_key(tmp_path: Path) -> None:
    file = tmp_path / "attention.json"
    Router([FAST], store=Store(file, ("torch", "diffusers", "not-installed"))).choose(call_of())
    (place,) = json.loads(file.read_text())
    assert place.startswith("cpu; torch ")
    assert "diffusers " in place
    assert "not-installed" not in place
    other = Router([FAST], store=Store(file))
    other.choose(call_of())
    assert other.times


def test_the_place_follows_the_custom_of_the_desktop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_file() == tmp_path / "postgen" / "attention.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_file() == tmp_path / ".cache" / "postgen" / "attention.json"


@pytest.mark.parametrize(
    ("tokens", "expected"), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 6), (7, 8), (32760, 32768), (119056, 131072)]
)
def test_buckets(tokens: int, expected: int) -> None:
    assert bucket(tokens) == expected


def test_on_a_cpu_nothing_is_timed_and_torch_runs() -> None:
    query = torch.randn(1, 700, 8, 64)
    router.cache_clear()
    out = attention(query, query, query)
    assert not router().times
    heads_first: Tensor = query.transpose(1, 2)
    expected = torch.nn.functional.scaled_dot_product_attention(heads_first, heads_first, heads_first)
    assert torch.equal(out, expected.transpose(1, 2))


def test_the_last_backend_is_that_of_the_thread() -> None:
    query = torch.randn(1, 9, 2, 16)
    attention(query, query, query, backend="math")
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(last_backend).result() is None
    assert last_backend() == "math"


def test_a_gpu_kernel_named_on_a_cpu_gives_way() -> None:
    query = torch.randn(1, 9, 2, 16)
    with pytest.warns(UserWarning, match="attention runs on sdpa, not on xformers: needs a CUDA GPU"):
        out = attention(query, query, query, backend="xformers")
    assert last_backend() == "sdpa"
    assert torch.equal(out, attention(query, query, query))
    assert {backend.name for backend in TIMED} < set(backend_names())


def test_info_says_which_backends_work_here() -> None:
    findings = {name: (usable, detail) for name, usable, detail in attention_backends()}
    assert tuple(findings) == backend_names()
    assert findings["math"] == (True, f"torch {version('torch')}")
    if not torch.cuda.is_available():
        assert findings["fa4"] == (False, "needs a CUDA GPU")
