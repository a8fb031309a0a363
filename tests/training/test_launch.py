"""Options of `accelerate launch` are used, or refused with an error of one line."""

import os
import warnings

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import prepare_simple_launcher_cmd_env

from postgen.errors import UserError
from postgen.training.launch import check_launch, make_accelerator
from tests.training.tiny import TinyConfig, TinyTrainer


@pytest.fixture
def fresh():
    """Reset accelerate before and after a test, because it keeps the settings of the first trainer of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def config(folder, **settings):
    return TinyConfig(output_dir=str(folder / "run"), report_to=[], disable_tqdm=True, max_steps=1, **settings)


def launched(monkeypatch, *words):
    """Set the environment variables that the launcher sets for one process."""
    usual = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    # If an option occurs twice, the last value counts.
    args = launch_command_parser().parse_args([*usual, *words, "script.py"])
    args.use_cpu, args.num_cpu_threads_per_process = args.cpu, 1
    _, environment = prepare_simple_launcher_cmd_env(args)
    for name in environment.keys() - os.environ.keys():
        monkeypatch.setenv(name, environment[name])


@pytest.mark.parametrize(
    ("words", "settings", "message"),
    [
        (["--mixed_precision", "bf16"], {}, "set bf16: true in the recipe (--bf16 true)"),
        (["--mixed_precision", "fp16"], {}, "only bfloat16 is supported, with bf16: true in the recipe"),
        (["--mixed_precision", "fp16"], {"bf16": True}, "its bf16 is true"),
        (["--dynamo_backend", "inductor"], {}, "dynamo_backend inductor, but the recipe decides about compilation"),
        (
            ["--cpu", "--num_processes", "2"],
            {},
            "accelerate launch has started only one: for one process unset MASTER_ADDR",
        ),
        (["--num_processes", "2"], {}, "use --config_file recipes/accelerate/ddp_cpu.yaml"),
        (["--cpu"], {"device": "cuda"}, "accelerate launch has --cpu, but device is cuda"),
    ],
)
def test_what_is_not_heeded_is_refused(tmp_path, monkeypatch, words, settings, message):
    launched(monkeypatch, *words)
    with pytest.raises(UserError) as caught:
        TinyTrainer(config(tmp_path, **settings))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM cannot be used"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "parallelism_config (tensor, context and sequence"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "set it there (--gradient_accumulation_steps 4)"),
    ],
)
def test_other_ways_to_spread_a_model_are_refused(tmp_path, monkeypatch, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught:
        check_launch(config(tmp_path, gradient_accumulation_steps=2))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        ([], {}),
        (["--cpu"], {"device": "cpu"}),
        (["--mixed_precision", "bf16"], {"bf16": True}),
        (["--mixed_precision", "no"], {"bf16": True}),
    ],
)
def test_what_agrees_is_heeded(tmp_path, monkeypatch, fresh, words, settings):
    launched(monkeypatch, *words)
    trainer = TinyTrainer(config(tmp_path, **settings))
    assert trainer.accelerator.mixed_precision == ("bf16" if settings.get("bf16") else "no")
    assert trainer.accelerator.num_processes == 1
    trainer.train()
    assert trainer.global_step == 1


def test_another_device_than_the_recipes_is_told(tmp_path, monkeypatch, fresh):
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "meta")
    with pytest.raises(UserError, match="device is cpu, but accelerate uses meta"):
        make_accelerator(config(tmp_path, device="cpu"))


def test_processes_that_did_not_come_together_are_told(tmp_path, monkeypatch, fresh):
    make_accelerator(config(tmp_path, device="cpu"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="asks for 2 processes"):
        make_accelerator(config(tmp_path, device="cpu"))


def test_a_process_that_has_a_number_is_one_of_several(tmp_path, monkeypatch):
    launched(monkeypatch, "--cpu", "--num_processes", "2")
    with pytest.raises(UserError, match="has started only one"):
        check_launch(config(tmp_path))
    monkeypatch.setenv("LOCAL_RANK", "0")
    check_launch(config(tmp_path))


def test_bf16_says_nothing_of_norms_in_two_types(fresh, tmp_path):
    x, weight = torch.ones(2, 4, dtype=torch.bfloat16), torch.ones(4)
    said = []
    try:
        torch.set_warn_always(True)
        for bf16 in (False, True):
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                if bf16:
                    make_accelerator(config(tmp_path, bf16=True, device="cpu"))
                torch.rms_norm(x, (4,), weight, 1e-6)
            said.append(any("Mismatch dtype" in str(each.message) for each in found))
    finally:
        torch.set_warn_always(False)
    assert said == [True, False]
