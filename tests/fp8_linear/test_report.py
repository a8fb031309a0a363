"""The pages of low precision have the numbers of the result files, and one file joins the gates of several."""

from __future__ import annotations

import pytest

from benchmarks import docs_tables, lowp_report
from benchmarks.gates import read_result
from benchmarks.lowp_report import joined, results


def test_the_pages_have_the_numbers_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    written = {}
    monkeypatch.setattr(docs_tables, "write", lambda page, tables: written.update({page: dict(tables)}))
    lowp_report.write_pages(results())
    assert [page.name for page in written] == ["low_precision.md", "low_precision_linears.md"]
    for page, tables in written.items():
        text = page.read_text(encoding="utf-8")
        assert docs_tables.filled(text, {name: list(lines) for name, lines in tables.items()}) == text


def test_gates_of_other_files_are_joined() -> None:
    attention = {"gates": [{"name": "fp8_error", "value": 0.05, "op": "<=", "target": 0.06, "ok": True}]}
    steps = {
        "gates": [{"name": "step_14b_480p_vs_stock", "value": 1.7}, {"name": "slowest_step_vs_exact", "value": 2}]
    }
    found = {each["name"]: each for each in joined({"lowp_attention": attention, "lowp_steps": steps})}
    assert [*found] == ["fp8_error", *lowp_report.JOINED]
    assert (found["step_14b_480p_vs_stock"]["value"], found["step_14b_480p_vs_stock"]["ok"]) == (1.7, True)
    assert found["judge_drop"]["value"] is None
    again = joined({"lowp_attention": {"gates": [*found.values()]}, "lowp_steps": steps})
    assert again == [*found.values()]


def test_the_committed_result_has_all_gates() -> None:
    names = {each["name"] for each in read_result("lowp_attention")["gates"]}
    assert names >= {"fp8_vs_fa4", "fp8_vs_cudnn_bf16", "fp8_error", "fp8_error_hard", *lowp_report.JOINED}
