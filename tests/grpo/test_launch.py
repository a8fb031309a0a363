"""Starting runs: config files of accelerate, refused launches, the estimate of `--dry-run`."""

from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from postgen.train import main
from tests.grpo.toy import SETTINGS

ROOT = Path(__file__).resolve().parents[2]
FILES = {"single": "NO", "ddp": "MULTI_GPU", "ddp_cpu": "MULTI_GPU", "fsdp2": "FSDP", "zero3": "DEEPSPEED"}


def recipe(folder, **changes):
    path = folder / "recipe.yaml"
    values = {**SETTINGS, "method": "tests.grpo.killed:KilledGRPO", "report_to": "none"}
    path.write_text(yaml.safe_dump({**values, "output_dir": str(folder / "run"), **changes}))
    return str(path)


def test_grpo_accelerate_files_are_read_by_accelerate():
    found = {path.stem: path for path in (ROOT / "recipes" / "accelerate").glob("*.yaml")}
    assert found.keys() == FILES.keys()
    for name, kind in FILES.items():
        config = load_config_from_file(str(found[name]))
        assert config.distributed_type.value == kind
        # The recipe decides about bfloat16; accelerate would also apply a value of this file.
        assert config.mixed_precision == "no"
    assert load_config_from_file(str(found["fsdp2"])).fsdp_config["fsdp_version"] == 2
    assert "ZeRO-3 is not supported" in found["zero3"].read_text()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("single", "Run on: 1 GPU "),
        ("ddp", "Run on: 2 GPUs (H200, one host)"),
        ("fsdp2", "Run on: 1 and 2 GPUs (H200, one host)"),
        ("ddp_cpu", "Run on: 2 CPU processes"),
        ("zero3", "Run on: none"),
    ],
)
def test_grpo_accelerate_files_say_on_how_many_gpus_they_ran(name, said):
    lines = (ROOT / "recipes" / "accelerate" / f"{name}.yaml").read_text().splitlines()
    head = " ".join(line.removeprefix("# ") for line in lines if line.startswith("# "))
    assert said in head
    if "2 GPUs" in said:
        log = (ROOT / "benchmarks" / "results" / "two_gpus.txt").read_text()
        for trainer in ("dancegrpo", "diffusion_nft"):
            assert f"{trainer}-{name}: " in log


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed (ZeRO) cannot be used"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP 1 cannot be used"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "accelerate's FSDP does nothing on CPUs"),
    ],
)
def test_grpo_refuses_launches_that_it_cannot_heed(tmp_path, monkeypatch, capsys, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main([recipe(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_grpo_dry_run_is_a_flag(tmp_path, capsys, cli):
    assert main([recipe(tmp_path, max_steps=7), "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "2 prompts x 8 samples per rollout, 1 update per rollout, 7 in total" in told
    assert "bytes/weights" in told
    assert "forward_equivalents/run" in told
    assert not (tmp_path / "run").exists()
    assert "2 prompts x 8 samples" in cli("train", tmp_path / "recipe.yaml", "--dry-run").out
    other = recipe(tmp_path, method="tests.training.tiny:WitnessTrainer")
    Path(other).write_text(f"method: tests.training.tiny:WitnessTrainer\noutput_dir: {tmp_path}/run\n")
    assert main([other, "--dry-run"]) == 2
    assert "--dry-run: method 'tests.training.tiny:WitnessTrainer' has no cost estimate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_generation": 4}, "Unknown key 'num_generation'"),
        ({"num_generations": 1}, "num_generations is 1"),
        ({"num_generations": 5}, "must be a multiple of num_generations, which is 5. Use num_generations 4 or 8"),
        ({"lora_target_modules": ["nothing"], "use_peft": True}, "'nothing' matches no layer of ToyModel"),
    ],
)
def test_grpo_bad_recipes_end_with_one_line_and_code_2(tmp_path, capsys, changes, message):
    assert main([recipe(tmp_path, **changes)]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert not list(tmp_path.glob("run/checkpoint-*"))


def test_grpo_reward_that_always_fails_ends_the_command(tmp_path, capsys):
    assert main([recipe(tmp_path, method="tests.grpo.killed:FailingGRPO")]) == 2
    assert "every reward failed on every one of 16 samples of step 1" in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.glob("run/checkpoint-*"))
