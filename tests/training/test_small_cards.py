"""The benchmark of small cards at the size of its `--tiny`: a row, its gates, and the rows that a machine skips."""

import json

import torch
from safetensors.torch import load_file

from benchmarks import small_cards, small_cards_report
from benchmarks.gates import gate
from benchmarks.small_cards import ROWS, line, named, one
from benchmarks.small_cards_model import write_model


def test_a_row_trains_with_its_settings_and_has_the_estimate(tmp_path):
    cpu = torch.device("cpu")
    model = write_model(tmp_path / "model", cpu, tiny=True)
    settings = named({**ROWS["all"], "optim": "adafactor"}, 2)
    assert settings["offload_blocks"] == 2
    row = one(tmp_path, model, settings, {"num_frames": 5, "height": 32, "width": 32}, cpu)
    assert row["base_quant"] == "int8"
    assert 0 < row["activations_gb"] < row["estimated_gb"] <= row["needed_gb"]
    assert row["seconds_per_step"] > 0
    assert "measured       -" in line({"name": "all", **row})
    assert not (tmp_path / "run").exists()


def test_every_row_has_valid_settings():
    assert named(ROWS["+ half of the blocks"], 30)["offload_blocks"] == 15
    assert all(settings.get("gradient_checkpointing") for name, settings in ROWS.items() if name != "no saving")


def test_the_text_encoder_has_its_embedding_once(tmp_path):
    model = write_model(tmp_path / "model", torch.device("cpu"), tiny=True)
    tensors = load_file(model / "text_encoder" / "model.safetensors")
    assert [name for name, value in tensors.items() if len(value) == 512] == ["shared.weight"]


def test_a_call_goes_on_with_the_rows_of_the_file(tmp_path, monkeypatch, capsys):
    rows = {"first": {}, "wrong": {"optim": "adafactor", "lora_r": -1}, "+ nf4 base": ROWS["+ nf4 base"]}
    monkeypatch.setattr(small_cards, "ROWS", rows)
    words = ["--tiny", "--output", str(tmp_path / "cards.json")]

    def found():
        return json.loads((tmp_path / "cards.json").read_text())

    assert small_cards.main([*words, "--seconds", "1"]) == 3
    assert "left out, the time is over: first, wrong" in capsys.readouterr().out
    # A row that fails does not take the others with it, and is measured again.
    assert small_cards.main(words) == 1
    first, wrong = found()["rows"]
    assert first["seconds_per_step"] > 0
    assert "lora_r" in wrong["problem"]
    assert "+ nf4 base" in found()["skipped"]
    assert found()["gates"][1]["value"] is None
    rows["wrong"] = {"optim": "adafactor"}
    assert small_cards.main(words) == 0
    assert found()["rows"][0] == first
    assert "problem" not in found()["rows"][1]
    # Rows of other sizes, devices or versions do not count.
    text = (tmp_path / "cards.json").read_text()
    (tmp_path / "cards.json").write_text(text.replace('"tiny": true', '"tiny": false'))
    assert small_cards.main([*words, "--seconds", "1"]) == 3
    assert found()["rows"] == []


def test_the_page_has_the_tables_of_a_result(tmp_path):
    row = {"estimated_gb": 12.5, "measured_gb": 12.25, "whole_run_gb": 13.125, "seconds_per_step": 1.5}
    result = {
        "rows": [{"name": "no saving", **row}, {"name": "+ int8 base", "problem": "OutOfMemoryError"}],
        "skipped": {"+ nf4 base": "needs bitsandbytes"},
        "cards": [
            {"card_gb": 8, "settings": None, "trained": False},
            {"card_gb": 16, "settings": "no saving", "trained": True, "measured_gb": 12.25, "seconds_per_step": 1.5},
        ],
        "gates": [gate("sft_wan_1p3b_peak_gb", 13.125, "<=", 16)],
    }
    page = tmp_path / "page.md"
    page.write_text(small_cards_report.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "cards.json").write_text(json.dumps(result))
    small_cards_report.write_page(page, str(tmp_path / "cards.json"))
    lines = page.read_text(encoding="utf-8").splitlines()
    assert "| no saving | 12.5 | 12.2 | 13.1 | 1.50 |" in lines
    assert "| + int8 base |  | OutOfMemoryError |  |  |" in lines
    assert "Not measured: `+ nf4 base` (needs bitsandbytes)." in lines
    assert "| 8 GB | none fits | no |  |  |" in lines
    assert "| 16 GB | no saving | yes | 12.2 | 1.50 |" in lines
    assert "| `sft_wan_1p3b_peak_gb` | 13.12 | <= 16 | met |" in lines
