"""Context parallelism on two processes: Ulysses gives what one process gives, ring attention is refused."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

import postgen
from tests.families.tiny_models import TinyModel, tiny_model
from tests.training.pair import run_pair

CONFIG = postgen.EnhanceAVideoConfig(relative_weight=0.4)


FAMILIES = ("Wan", "LTX")


def model(name: str) -> TinyModel:
    """A tiny model with text that can be halved and has no mask: diffusers splits the text of LTX as well."""
    tiny = tiny_model(name, batch=2)
    tiny.arguments["encoder_hidden_states"] = tiny.arguments["encoder_hidden_states"][:, :4]
    if "encoder_attention_mask" in tiny.arguments:
        tiny.arguments["encoder_attention_mask"] = None
    return tiny


def rank_main(degree: str, folder: Path) -> None:
    """One of two processes: what each model predicts with its tokens split, or the message it ends with."""
    from diffusers import ContextParallelConfig

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.distributed.init_process_group("gloo")
    results: dict[str, Any] = {}
    for name in FAMILIES:
        tiny = model(name)
        # diffusers asks how many accelerators there are, even on the CPU.
        with patch.object(torch.accelerator, "device_count", lambda: 1):
            tiny.transformer.enable_parallelism(config=ContextParallelConfig(**{degree: 2}))
        handle = postgen.apply_enhance_a_video(tiny.transformer, CONFIG)
        try:
            results[name] = {"prediction": tiny(), "gains": handle.stats()}
        except postgen.UserError as error:
            results[name] = {"error": str(error)}
    torch.save(results, folder / f"{degree}-{torch.distributed.get_rank()}.pt")
    # Who leaves while the other's threads still read from it aborts, rarely, on a busy machine.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


JOBS = [partial(rank_main, degree) for degree in ("ulysses_degree", "ring_degree")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What both processes found, with each way to split."""
    found = tmp_path_factory.mktemp("pair")
    run_pair("tests.enhance.test_parallel:JOBS", found)
    return found


def both_ranks(folder: Path, degree: str) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{degree}-{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.slow
def test_ulysses_gives_what_one_process_gives(folder: Path) -> None:
    ranks = both_ranks(folder, "ulysses_degree")
    for name in FAMILIES:
        tiny = model(name)
        off = tiny()
        handle = postgen.apply_enhance_a_video(tiny.transformer, CONFIG)
        expected = tiny()
        assert (expected - off).abs().max() > 1e-3
        for rank in ranks:
            assert torch.allclose(rank[name]["prediction"], expected, atol=1e-5)
            for layer, gains in handle.stats().items():
                assert rank[name]["gains"][layer] == pytest.approx(gains, abs=1e-6)


@pytest.mark.slow
def test_ring_attention_is_refused(folder: Path) -> None:
    for rank in both_ranks(folder, "ring_degree"):
        for name in FAMILIES:
            assert "does not work with ring attention (ring_degree=2): use ulysses_degree" in rank[name]["error"]
