"""The choice of offloading, tested with given numbers of bytes, because no test has a GPU that is too small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from postgen import UserError
from postgen.families import offload
from postgen.families.loading import inspect_model, load_pipeline
from postgen.generate import GenerateConfig, prepare

WAN_14B = {"transformer": 28 * 2**30, "text_encoder": 11 * 2**30, "vae": 2**29}


@pytest.mark.parametrize(
    ("gib", "expected"),
    [(80, "none"), (53, "none"), (52, "model"), (38, "model"), (37, "sequential"), (1, "sequential")],
)
def test_auto_takes_the_quickest_that_fits(gib: int, expected: str) -> None:
    assert offload.choose_offload(WAN_14B, gib * 2**30) == expected


def test_what_is_chosen_is_what_diffusers_is_asked_for(tiny_wan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import WanPipeline

    pipe: Any = WanPipeline.from_pretrained(tiny_wan)
    parts = {
        name: sum(tensor.nbytes for tensor in (*part.parameters(), *part.buffers()))
        for name, part in pipe.components.items()
        if name in ("transformer", "text_encoder", "vae")
    }
    asked: list[tuple[str, str]] = []
    for name in ("enable_model_cpu_offload", "enable_sequential_cpu_offload"):
        monkeypatch.setattr(WanPipeline, name, lambda self, device, name=name: asked.append((name, device)))
    monkeypatch.setattr(WanPipeline, "to", lambda self, place: asked.append(("to", place)))
    free = {"none": 2 * sum(parts.values()), "model": int(max(parts.values()) / 0.75) + 1, "sequential": 10}
    for chosen, here in free.items():
        monkeypatch.setattr(offload, "_free", lambda place, here=here: here)
        for kind in ("auto", chosen):
            offload.place_weights(pipe, "cuda:0", kind)
    names = ["to", "enable_model_cpu_offload", "enable_sequential_cpu_offload"]
    assert asked == [(name, "cuda:0") for name in names for _ in range(2)]


def test_where_there_is_no_gpu_auto_keeps_all_and_the_others_are_refused_before_the_load(tiny_wan: Path) -> None:
    pipe = load_pipeline(inspect_model(tiny_wan), device="cpu", offload="auto")
    assert pipe.device.type == "cpu"
    prepare(GenerateConfig(prompt="a", model=str(tiny_wan), device="cpu", offload="auto"))
    for kind in ("model", "sequential"):
        with pytest.raises(UserError, match="moves components to a GPU"):
            prepare(GenerateConfig(prompt="a", model=str(tiny_wan), device="cpu", offload=kind))
