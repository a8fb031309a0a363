"""The table of docs/pipelines.md with the plug-ins that each drop-in pipeline accepts."""

from __future__ import annotations

import postgen.pipelines as drop_ins
from benchmarks.docs_tables import filled
from benchmarks.plug_in_table import NAME, PAGE, accepts, table, transformers_in


def test_the_table_is_up_to_date() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text == filled(text, {NAME: table()}), "run python -m benchmarks.plug_in_table"


def test_every_pipeline_is_in_one_row() -> None:
    rows = [line.removeprefix("| ").partition(" (")[0] for line in table()][2:]
    names = [name.strip("`") for row in rows for name in row.split(", ")]
    assert sorted(names) == drop_ins.__all__
    assert transformers_in("WanPipeline") == dict.fromkeys(("transformer", "transformer_2"), "WanTransformer3DModel")


def test_a_plug_in_accepts_only_the_classes_that_it_knows() -> None:
    assert accepts("postgen.fused:check_known", "WanTransformer3DModel")
    assert not accepts("postgen.fused:check_known", "MochiTransformer3DModel")
    assert not accepts("postgen.fp8_linear:check_known", "Unknown")
