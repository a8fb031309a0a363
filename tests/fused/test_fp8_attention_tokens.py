"""FP8 attention over few tokens stays exact without a warning."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch

import postgen
from postgen.fused.fp8_attention import FP8AttentionConfig, FP8AttentionReport, apply_fp8_attention, state
from postgen.fused.fp8_attention.config import USUAL
from postgen.fused.fp8_attention.report import ReportRow
from postgen.kernels.attention import backends
from postgen.kernels.dispatch import TOLD
from tests.families.tiny_models import tiny_model


def test_few_tokens_stay_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens stay exact without a warning. With `min_tokens=0`, a warning names the remaining reason."""
    wan = tiny_model("Wan")
    monkeypatch.setattr(state, "check_available", lambda *_: None)
    stock = wan()
    handle = apply_fp8_attention(wan.transformer, FP8AttentionConfig(first_exact_steps=0, last_exact_steps=0))
    TOLD.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(wan(), stock)
    assert "note: 2 layers stayed exact in the last call: fewer than" in str(postgen.summary(wan.transformer))
    handle.update(min_tokens=0)
    assert "note" not in str(postgen.summary(wan.transformer))
    with pytest.warns(UserWarning, match="attention stays exact, not FP8: cudnn_fp8 needs a CUDA GPU"):
        assert torch.equal(wan(), stock)


def test_a_report_with_times_asks_for_no_tokens() -> None:
    row = ReportRow(layer="a", step=0, error=0.05, worst_head=0.06, preparation=USUAL)
    timed = replace(row, exact_ms=2.0, fp8_ms=1.0)
    reports = [FP8AttentionReport(rows=(each,), max_error=0.1, steps=1) for each in (row, timed)]
    assert [each.config().min_tokens for each in reports] == [FP8AttentionConfig().min_tokens, 0]


@pytest.mark.parametrize(("installed", "fewest"), [(False, 16_384), (True, 32_000)])
def test_more_tokens_are_needed_where_flash_attention_4_is_installed(
    monkeypatch: pytest.MonkeyPatch, installed: bool, fewest: int
) -> None:
    """With FlashAttention-4, FP8 attention is slower at the 17,776 tokens of CogVideoX-5B."""
    monkeypatch.setattr(backends.Backend, "installed", lambda _: installed)
    monkeypatch.setattr(state, "check_available", lambda *_: None)
    transformer = tiny_model("Wan").transformer
    handle = apply_fp8_attention(transformer)
    assert FP8AttentionConfig().fewest_tokens == fewest
    assert f"from {fewest} tokens on" in str(postgen.summary(transformer))
    handle.update(min_tokens=5)
    assert "from 5 tokens on" in str(postgen.summary(transformer))
