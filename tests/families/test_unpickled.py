"""A pickled model with plug-ins computes the same in another process, which has not applied any plug-in itself."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import postgen
from tests.children import run
from tests.families.tiny_models import tiny_model

APPLY: dict[str, Callable[[Any], Any]] = {
    "enhance": lambda model: postgen.apply_enhance_a_video(model, postgen.EnhanceAVideoConfig(weight=4.0)),
    "fp8_attention": lambda model: postgen.apply_fp8_attention(
        model, postgen.FP8AttentionConfig(first_exact_steps=0, last_exact_steps=0, simulate=True)
    ),
    "fp8_linears": lambda model: postgen.apply_fp8_linears(model, postgen.FP8LinearConfig(simulate=True)),
    "fused": postgen.apply_fused_ops,
}


def test_another_process_computes_the_same(tmp_path: Path) -> None:
    models = {}
    for name, apply in APPLY.items():
        tiny = tiny_model("Wan")
        stock = tiny()
        apply(tiny.transformer)
        found = tiny()
        assert not torch.equal(found, stock), name
        models[name] = tiny.transformer, tiny.arguments, found
    file = tmp_path / "models.pickle"
    file.write_bytes(pickle.dumps(models))
    code, said = run("tests.families.unpickled", file)
    assert code == 0, said
