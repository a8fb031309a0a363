"""Configurations in parts: nested and flat keys are equivalent, and each mistake has its error message."""

import os
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

import pytest
import yaml

from postgen.errors import UserError
from postgen.grpo.config import DanceGRPOConfig
from postgen.grpo.nft import DiffusionNFTConfig
from postgen.sampling.config import SamplingConfig
from postgen.settings import Part
from postgen.training import TrainingConfig, load_recipe
from postgen.training.lora import AdapterConfig
from postgen.training.nested import flat, parts_of
from postgen.training.policy import ModelConfig
from postgen.training.prompts import PromptsConfig

FLAT = {
    "output_dir": "run", "method": "dancegrpo", "model": "some/model", "flow_shift": 3, "lora_r": 16, "lora_alpha": 8,
    "use_peft": True, "height": 64, "guidance_scale": 2.5, "rollout_solver": "dpm++", "train_dataset": "p.jsonl",
    "reward_funcs": ["world"], "reward_weights": [0.5], "eval_prompts": 3, "eval_grid": 0, "eval_steps": 5,
    "learning_rate": 1e-3, "max_steps": 7, "num_generations": 4, "sde_type": "exact", "report_to": "none",
}  # fmt: skip
NESTED = {
    "method": {"name": "dancegrpo", "num_generations": 4, "sde_type": "exact"},
    "output_dir": "run",
    "model": {"model": "some/model", "flow_shift": 3},
    "lora": {"r": 16, "lora_alpha": 8, "use_peft": True},
    "sampling": {"height": 64, "guidance_scale": 2.5, "rollout_solver": "dpm++"},
    "prompts": {"train_dataset": "p.jsonl"},
    "reward": {"funcs": ["world"], "weights": [0.5]},
    "eval": {"prompts": 3, "grid": 0},
    "training": {"learning_rate": 1e-3, "max_steps": 7, "report_to": "none"},
    "eval_steps": 5,
}


def written(folder: Path, values: dict) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_both_spellings_are_one_configuration(tmp_path):
    flat_one, nested = DanceGRPOConfig.from_dict(FLAT), DanceGRPOConfig.from_dict(NESTED)
    assert nested == flat_one == DanceGRPOConfig(**FLAT)
    assert (nested.lora_r, nested.eval_prompts, nested.reward_funcs, nested.method) == (16, 3, ["world"], "dancegrpo")
    for values in (FLAT, NESTED):
        _, config = load_recipe(written(tmp_path, values), ["--lora_r", "4", "--eval-grid", "2"])
        assert config.to_dict() == {**flat_one.to_dict(), "lora_r": 4, "eval_grid": 2}
    # The config that a run writes is flat.
    assert DanceGRPOConfig.from_dict(flat_one.to_dict()) == flat_one


@pytest.mark.parametrize("config", [DanceGRPOConfig, DiffusionNFTConfig])
def test_each_field_has_one_owner(config):
    parts = parts_of(config)
    common = {"training", "rescue", "merge", "model", "lora", "memory", "prompts", "sampling", "method"}
    assert set(parts) == {*common, "reward", "eval", "brakes"}
    owned = [name for names in parts.values() for name in names]
    assert sorted([*owned, "method"]) == sorted(item.name for item in fields(config))
    assert len(owned) == len(set(owned))
    # A setting whose default a method changes stays in its part.
    assert "learning_rate" in parts["training"]
    assert {"num_generations", "share_initial_noise", "beta"} <= set(parts["method"])


def test_a_method_has_only_its_parts(tmp_path):
    tiny = "tests.training.tiny:TinyTrainer"
    path = written(tmp_path, {"method": {"name": tiny, "width": 5}, "training": {"output_dir": "run"}})
    assert load_recipe(path)[1].width == 5
    path = written(tmp_path, {"method": tiny, "output_dir": "run", "lora": {"r": 3}})
    with pytest.raises(
        UserError,
        match=r"TinyConfig has no part 'lora' \(.*recipe.yaml\): its parts are training, rescue, merge, method",
    ):
        load_recipe(path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lora": {"r": 3}, "lora_r": 3}, "lora_r is given twice in here: keep one of the two"),
        ({"lora_r": 3, "lora": {"r": 3}}, "lora_r is given twice in here"),
        ({"lora": {"r": 3, "lora_r": 3}}, "lora_r is given twice in here"),
        ({"lora": {"rr": 3}}, "Unknown key 'rr' in the part lora of here. Did you mean 'r'?"),
        ({"lora": {"height": 3}}, "Unknown key 'height' in the part lora of here: it is a key of the part sampling."),
        ({"sampling": {"guidance": 3.0}}, "'guidance' in the part sampling .* Did you mean 'guidance_scale'"),
        ({"method": {"lora_r": 3}}, "Unknown key 'lora_r' in the part method of here: it is a key of the part lora."),
        ({"lorra": {"r": 3}}, "DanceGRPOConfig has no part 'lorra' .*: its parts are training, rescue, merge, model"),
        ({"lora": 32}, r"lora in here is 32, it must be a mapping with the keys of this part \(use_peft, lora_r"),
        ({"sampling": ["height"]}, r"sampling in here is \['height'\], it must be a mapping"),
        ({"guidance_scal": 3}, "Unknown key 'guidance_scal' in here. Did you mean 'guidance_scale'?"),
    ],
)  # fmt: skip
def test_mistakes(values, message):
    with pytest.raises(UserError, match=message):
        flat(DanceGRPOConfig, values, "here")


def test_a_field_is_no_part():
    with pytest.raises(UserError, match=r"height is \{'pixels': 3\}, it must be a whole number"):
        DanceGRPOConfig.from_dict({"output_dir": "run", "height": {"pixels": 3}})


def test_the_environment_is_no_part(tmp_path, monkeypatch):
    monkeypatch.setenv("POSTGEN_TEST", "before")
    path = written(tmp_path, {**NESTED, "env": {"POSTGEN_TEST": "set"}})
    load_recipe(path)
    assert os.environ["POSTGEN_TEST"] == "set"


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        (SamplingConfig, {"num_inference_steps": 1}, "num_inference_steps is 1, it must be at least 2"),
        (SamplingConfig, {"rollout_solver": "heun"}, "rollout_solver is 'heun'. Allowed: euler, dpm"),
        (AdapterConfig, {"lora_r": 0}, "lora_r is 0, it must be at least 1"),
        (ModelConfig, {"flow_shift": 0}, "flow_shift is 0.0, it must be above 0"),
        (ModelConfig, {"max_sequence_length": 0}, "max_sequence_length is 0, it must be at least 1"),
        (PromptsConfig, {"shuffle_dataset": "no"}, "shuffle_dataset is 'no', it must be true or false"),
    ],
)
def test_parts_check_themselves(part, values, message):
    """A part checks its values on its own, and also in a configuration that inherits from it."""
    with pytest.raises(UserError, match=message):
        part(**values)
    with pytest.raises(UserError, match=message):
        DanceGRPOConfig(output_dir="run", **values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora: {r: 8}\nlora: {alpha: 9}", r"line 4, column 1: lora is given twice"),
        ("lora: {r: 8, r: 9}", "r is given twice"),
        ("seed: 1\nseed: 2", "seed is given twice"),
        ("env:", "env in .* is None, it must be a mapping of environment variables"),
        ("env: [A]", r"env in .* is \['A'\], it must be a mapping"),
        ("report_to: 3", "report_to is 3, it must be a list"),
    ],
)
def test_wrong_yaml_is_told(text, message, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"method: dancegrpo\noutput_dir: run\n{text}\n")
    with pytest.raises(UserError, match=message):
        load_recipe(path)


def test_a_merged_mapping_may_be_overridden(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        yaml.safe_dump({key: FLAT[key] for key in ("method", "output_dir", "model", "train_dataset", "reward_funcs")})
        + "sampling: &small {height: 64, width: 32}\neval: {<<: {num_inference_steps: 3, grid: 1}, grid: 0}\n"
    )
    _, config = load_recipe(path)
    assert (config.height, config.eval_num_inference_steps, config.eval_grid) == (64, 3, 0)


def test_every_part_is_checked_once():
    calls: Counter[str] = Counter()

    @dataclass(kw_only=True)
    class Left(Part):
        part: ClassVar[str] = "left"
        a: int = 1

        def __post_init__(self):
            super().__post_init__()
            calls["left"] += 1
            assert isinstance(self.b, float)  # `b` is in the other part: all values are converted before any check

    @dataclass(kw_only=True)
    class Right(Part):
        part: ClassVar[str] = "right"
        b: float = 1.0

        def __post_init__(self):
            super().__post_init__()
            calls["right"] += 1

    @dataclass(kw_only=True)
    class Both(Left, Right, TrainingConfig):
        def __post_init__(self):
            super().__post_init__()
            calls["both"] += 1

    Both(output_dir="run", b=2)
    assert calls == {"left": 1, "right": 1, "both": 1}
    assert parts_of(Both)["left"] == ["a"]
