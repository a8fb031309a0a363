"""Runs resumed with another number of processes (gloo) train equal weights, or are refused with a fix."""

import pytest
import torch
from safetensors.torch import load_file

from postgen.grpo.batches import Batches
from postgen.grpo.state import shared_anew
from postgen.training import checkpoint
from postgen.training.resume import section
from tests.grpo.others import MIDDLE, ONE, OWN, TWO, configuration, train
from tests.grpo.toy import lines_of
from tests.training.pair import run_pair

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return runs of both methods in one and two processes, and runs resumed from one number to the other."""
    found = tmp_path_factory.mktemp("others")
    for name in OWN:
        train(found, name, "one", **ONE)
    run_pair("tests.grpo.others:JOBS", found)
    for name in OWN:
        train(found, name, "two-to-one", "two", **ONE)
    return found


def ranks_of(folder, run, step):
    return [section(each, "method.") for each in checkpoint.read(folder / run / f"checkpoint-{step}").ranks]


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("run", ["two", "one-to-two", "two-to-one"])
def test_it_learns_what_one_process_does(folder, name, run):
    for group in ("weights", "ema", "copies") if name in ("nft", "awm", "crd", "dgpo") else ("weights", "ema"):
        parts = [folder / f"{name}-{each}" / "checkpoint-4" / f"{group}.safetensors" for each in (run, "one")]
        found, expected = (load_file(part) for part in parts)
        assert found.keys() == expected.keys()
        assert max(float((found[key] - expected[key]).abs().max()) for key in found) <= 1e-6, group
    before = load_file(folder / f"{name}-one" / f"checkpoint-{MIDDLE}" / "weights.safetensors")
    after = load_file(folder / f"{name}-one" / "checkpoint-4" / "weights.safetensors")
    assert max(float((after[key] - before[key]).abs().max()) for key in before) >= 1e-4


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("run", ["one-to-two", "two-to-one"])
def test_its_log_and_costs_are_those_of_the_whole_run(folder, name, run):
    """The log line of step 4 averages all four steps, three of which ran in the earlier processes."""
    rows = [lines_of(folder / f"{name}-{each}")[-1] for each in (run, "one")]
    for key in ("loss", "reward"):
        assert rows[0][key] == pytest.approx(rows[1][key], rel=1e-4, abs=1e-6), key
    spent = [
        sum(each["cost"]["forward_equivalents"] for each in ranks_of(folder, f"{name}-{x}", 4)) for x in (run, "one")
    ]
    assert spent[0] == pytest.approx(spent[1])


def told(folder, name):
    texts = {(folder / f"{name}-{rank}.txt").read_text() for rank in (0, 1)}
    assert len(texts) == 1
    return texts.pop()


def test_a_second_run_of_several_processes_is_refused(folder):
    assert told(folder, "another-run").startswith("the group of these 2 processes has ended with an earlier run")


def test_another_global_batch_is_told_what_to_set(folder):
    text = told(folder, "another-batch")
    assert text.endswith(
        "checkpoint-3 was written by 1 process, this run has 2: the checkpoint's run has 8 samples per update and 2 "
        "updates per rollout, this run has 16 and 2. Set gradient_accumulation_steps 1 and steps_per_generation 2 "
        "(and no generation_batch_size), or start 1 process"
    )
    assert "\n" not in text


@pytest.mark.parametrize("name", OWN)
def test_shared_out_and_back_it_is_the_same(folder, name):
    one, two = (configuration(folder, name, **shares) for shares in (ONE, TWO))
    states = ranks_of(folder, f"{name}-one", MIDDLE)
    parts = [Batches.of(two, 2, rank) for rank in (0, 1)]
    halves = [shared_anew(states, one.to_dict(), two, part) for part in parts]
    assert [set(half["samples"]) <= set(part.mine()) for half, part in zip(halves, parts, strict=True)] == [True, True]
    assert len(halves[0]["samples"]) == len(halves[1]["samples"]) == len(states[0]["samples"]) // 2
    assert [half["micro"] for half in halves] == [MIDDLE, MIDDLE]
    again = shared_anew(halves, two.to_dict(), one, Batches.of(one, 1, 0))
    assert again.keys() == states[0].keys()
    for key, value in states[0].items():
        assert torch.equal(again[key], value) if torch.is_tensor(value) else again[key] == value, key
