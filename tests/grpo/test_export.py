"""The export of a run that trained all weights can be used to generate and to train."""

import json
import shutil

import pytest
import torch

import postgen
from postgen.errors import UserError
from postgen.families.exports import read_note, write_note
from postgen.families.loading import inspect_model, load_pipeline
from postgen.training.lora import AdapterConfig
from postgen.training.policy import ModelConfig, load_policy
from tests.grpo.test_lora import video_run

SMALL = ("--frames", "5", "--height", "16", "--width", "16", "--steps", "2")


@pytest.fixture(scope="module")
def trained(tiny_wan, tmp_path_factory):
    """Return a finished run and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    run = video_run(tiny_wan, folder, use_peft=False, ema_decay=0.0)
    run.train()
    return run, folder / "run"


def same_weights(left, right):
    return all(torch.equal(a, b) for a, b in zip(left.parameters(), right.parameters(), strict=True))


def test_it_is_loaded_with_the_rest_of_its_model(trained, tiny_wan):
    run, folder = trained
    facts = inspect_model(folder / "export")
    assert facts.source == str(tiny_wan)
    pipe, base = load_pipeline(facts, device="cpu"), load_pipeline(inspect_model(tiny_wan), device="cpu")
    assert same_weights(pipe.transformer, run.policy.modules["transformer"])
    assert not same_weights(pipe.transformer, base.transformer)
    assert same_weights(pipe.text_encoder, base.text_encoder)
    assert load_pipeline(facts, device="cpu", dtype="bfloat16").transformer.dtype == torch.bfloat16


def test_generate_takes_it_as_a_model_and_its_sidecar_too(trained, tiny_wan, tmp_path, cli):
    _, folder = trained
    shutil.copytree(folder / "export", tmp_path / "elsewhere")
    words = ("generate", "a ball", *SMALL)
    told = cli(*words, "--model", tmp_path / "elsewhere", "-o", tmp_path / "a.mp4")
    assert told.code == 0, told.err
    told = cli("generate", "--from", tmp_path / "a.json", "-o", tmp_path / "again.mp4")
    assert told.code == 0, told.err
    assert cli(*words, "--model", tiny_wan, "-o", tmp_path / "base.mp4").code == 0
    first, again, base = ((tmp_path / f"{name}.mp4").read_bytes() for name in ("a", "again", "base"))
    assert first == again != base


def test_it_is_trained_on(trained, tiny_wan):
    run, folder = trained
    policy = load_policy(str(folder / "export"), ModelConfig(), AdapterConfig(use_peft=False), torch.device("cpu"))
    assert same_weights(policy.modules["transformer"], run.policy.modules["transformer"])
    assert policy.defaults.fps == 16


def test_folders_that_are_no_model_say_what_to_do(trained, tiny_wan, tmp_path, cli):
    _, folder = trained
    told = cli("generate", "a", "--model", folder, "-o", tmp_path / "x.mp4")
    assert told.err.endswith(f"it is the folder of a run: use {folder / 'export'}\n")
    (tmp_path / "lora" / "export").mkdir(parents=True)
    (tmp_path / "lora" / "export" / "pytorch_lora_weights.safetensors").touch()
    for place in (tmp_path / "lora" / "export", tmp_path / "lora"):
        told = cli("generate", "a", "--model", place, "-o", tmp_path / "x.mp4")
        assert f"it holds a LoRA: use --lora {place} (lora_path in a recipe)" in told.err
    shutil.copytree(folder / "export", tmp_path / "old", ignore=shutil.ignore_patterns("base.json"))
    told = cli("generate", "a", "--model", tmp_path / "old", "-o", tmp_path / "x.mp4")
    assert (told.code, told.err.count("\n")) == (2, 1)
    # Write the `base.json` that the message describes.
    (tmp_path / "old" / "base.json").write_text(json.dumps({"base": str(tiny_wan), "parts": ["transformer"]}))
    assert inspect_model(tmp_path / "old") != inspect_model(tiny_wan)


@pytest.mark.parametrize(
    ("note", "message"),
    [
        ("{", "cannot read"),
        ('{"base": "/nowhere", "parts": ["transformer"]}', "is an export of /nowhere, which"),
        ('{"base": "/nowhere", "parts": ["transformer_2"]}', "transformer_2/config.json is missing"),
        ('{"base": "/nowhere", "parts": []}', "must have a base .* and a list of parts, got '/nowhere', .."),
        ('{"base": "/nowhere", "parts": "transformer"}', "and a list of parts"),
        ('{"base": "EXPORT", "parts": ["transformer"]}', "that model is itself an export, name the whole model there"),
    ],
)
def test_a_wrong_note_is_told(trained, tmp_path, note, message):
    shutil.copytree(trained[1] / "export", tmp_path / "export")
    (tmp_path / "export" / "base.json").write_text(note.replace("EXPORT", str(tmp_path / "export")))
    with pytest.raises(UserError, match=message):
        inspect_model(tmp_path / "export")


def test_the_embedded_model_is_named_on_every_machine(tmp_path):
    class Named:
        name_or_path = str(postgen.embedded_model())

    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text("{}")
    write_note(tmp_path, Named(), ["transformer"])
    assert json.loads((tmp_path / "base.json").read_text())["base"] == "embedded"
    assert read_note(tmp_path).base == str(postgen.embedded_model())
    Named.name_or_path = None  # a model without a source folder
    write_note(tmp_path / "transformer", Named(), ["transformer"])
    assert read_note(tmp_path / "transformer") is None
