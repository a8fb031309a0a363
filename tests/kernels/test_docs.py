"""The examples of docs/kernels.md run as printed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import postgen
from tests.families.tiny_models import tiny_model

PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


class Pipe:
    """A stand-in with the parts of a pipeline that the examples use."""

    def __init__(self) -> None:
        self.tiny = tiny_model("Wan")
        self.transformer = self.tiny.transformer
        self.components = {"transformer": self.transformer}

    def __call__(self, prompt: str) -> None:
        self.tiny()


def given() -> dict[str, Any]:
    """Return the names that the examples use, with the token count of Wan at 480p and few heads."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 10, 2, 8).unbind()
    norm = nn.RMSNorm(128, device="cpu")
    return {
        "pipe": Pipe(),
        "prompt": "a ball",
        **{"query": query, "key": key, "value": value, "lengths": torch.tensor([10, 3])},
        **{"qkv": torch.randn(1, 21 * 30 * 52, 3, 1, 128), "norm_q": norm, "norm_k": norm},
        **{"w5x5": torch.randn(128, 5, 5), "w3": torch.randn(128, 3)},
    }


@pytest.mark.parametrize("code", EXAMPLES, ids=range(len(EXAMPLES)))
def test_example(code: str) -> None:
    names = given()
    try:
        exec(code, names)
    finally:
        if "set_attention_backend" in code:
            names["pipe"].transformer.set_attention_backend("native")
            names["pipe"].transformer.reset_attention_backend()
    if "out" in names:
        assert names["out"].isfinite().all()


def test_the_page_has_all_of_them() -> None:
    assert len(EXAMPLES) == 5
    called = {"apply_fused_ops", "routed_attention", "register_attention_backend"}
    assert all(f"postgen.{name}(" in "".join(EXAMPLES) and hasattr(postgen, name) for name in called)
