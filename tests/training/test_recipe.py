"""Recipes and configuration: accepted values, and the error message of each mistake."""

import signal

import pytest
import yaml

from postgen.errors import UserError
from postgen.train import main
from postgen.training import METHODS, TrainingConfig, load_recipe
from tests.training.tiny import TinyConfig, TinyTrainer

TINY = "tests.training.tiny:TinyTrainer"


@pytest.fixture
def recipe(tmp_path):
    def write(text=None, **values):
        path = tmp_path / "recipe.yaml"
        path.write_text(
            yaml.safe_dump({"method": TINY, "output_dir": str(tmp_path / "run"), **values}) if text is None else text
        )
        return path

    return write


def test_file_and_overrides(recipe):
    path = recipe(learning_rate="3e-4", width=5, report_to="none", resume_from_checkpoint=True)
    trainer, config = load_recipe(path, ["--width", "7", "--bf16", "--adam-beta2=0.95", "--report_to", "wandb"])
    assert trainer is TinyTrainer
    assert isinstance(config, TinyConfig)
    assert (config.learning_rate, config.width, config.bf16, config.adam_beta2) == (3e-4, 7, True, 0.95)
    assert (config.method, config.resume_from_checkpoint, config.report_to) == (TINY, "latest", ["wandb"])


@pytest.mark.parametrize(
    ("words", "trackers"),
    [
        (["--report_to", "[]"], []),
        (["--report-to=[]", "--width", "7"], []),
        (["--report_to", "wandb", "--report_to", "[]"], []),
        (["--report_to", "[]", "--report_to", "wandb", "trackio"], ["wandb", "trackio"]),
        ([], ["tensorboard"]),
    ],
)
def test_a_list_is_emptied_on_the_command_line(recipe, words, trackers):
    assert load_recipe(recipe(report_to=["tensorboard"]), words)[1].report_to == trackers
    with pytest.raises(UserError, match=r"max_steps must be a whole number, got '\[\]'"):
        load_recipe(recipe(), [*words, "--max_steps", "[]"])


@pytest.mark.parametrize(
    ("words", "trackers"),
    [
        (["--report_to", "[wandb, trackio]"], ["wandb", "trackio"]),
        (["--report_to", "[wandb,", "trackio]"], ["wandb", "trackio"]),
        (["--report-to=[wandb]", "--width", "7"], ["wandb"]),
        (["--report_to", "[]", "--report_to", "[wandb]"], ["wandb"]),
        (["--report_to", "[none]"], []),
    ],
)
def test_a_list_may_stand_in_brackets_on_the_command_line(recipe, words, trackers):
    assert load_recipe(recipe(), words)[1].report_to == trackers


@pytest.mark.parametrize("words", [["[wandb, [trackio]]"], ["[wandb"], ["[yes]"], ["[wandb: 1]"]])
def test_what_is_no_list_of_words_in_brackets_is_taken_as_it_is(recipe, words):
    with pytest.raises(UserError, match=r"unknown tracker '\["):
        load_recipe(recipe(), ["--report_to", *words])


@pytest.mark.parametrize(
    ("words", "where"),
    [(["--resume_from_checkpoint", "null"], None), (["--resume_from_checkpoint=null"], None), ([], "latest")],
)
def test_null_on_the_command_line_is_none_where_a_setting_may_be(recipe, words, where):
    path = recipe(resume_from_checkpoint="latest")
    assert load_recipe(path, words)[1].resume_from_checkpoint == where
    assert load_recipe(path, [*words, "--output_dir", "null"])[1].output_dir == "null"


def test_the_saved_config_is_a_recipe(recipe, tmp_path):
    path = recipe(max_steps=2, disable_tqdm=True, report_to="none", device="cpu")
    assert main([str(path)]) == 0
    again = load_recipe(tmp_path / "run" / "config.yaml")
    assert again == load_recipe(path)


@pytest.mark.parametrize(
    ("values", "words", "message"),
    [
        ({"lerning_rate": 1}, [], r"Unknown key 'lerning_rate' in .*recipe.yaml. Did you mean 'learning_rate'\?"),
        ({}, ["--max_step", "3"], r"Unknown key 'max_step' in the command line. Did you mean 'max_steps'\?"),
        ({}, ["--training.max_steps", "3"], r"Unknown key 'training.max_steps' in .* Did you mean 'max_steps'\?"),
        ({}, ["--max_steps", "many"], "^--max_steps must be a whole number, got 'many'"),
        ({}, ["--max_steps"], "^--max_steps needs a value"),
        ({}, ["--bf16", "maybe"], "^--bf16 must be true or false, got 'maybe'"),
        ({"max_steps": "many"}, [], "recipe.yaml: max_steps must be a whole number, got 'many'"),
        ({}, ["stray", "words"], "^'stray', 'words' are not options. Settings are given as --key value"),
        ({}, ["--no_bf16"], "^'--no_bf16' is not an option. Settings are given as --key value"),
        ({}, ["--lr_scheduler_type", "step"], "^--lr_scheduler_type must be one of .*, got 'step'"),
        ({"max_steps": 1.5}, [], "max_steps is 1.5, it must be a whole number"),
        ({"width": [3]}, [], r"width is \[3\], it must be a whole number"),
        ({"bf16": "perhaps"}, ["--max_steps", "1"], "recipe.yaml: bf16 must be true or false, got 'perhaps'"),
        ({"device": "tpu"}, [], "device is 'tpu'. Allowed: auto, cpu, cuda"),
        ({"method": "autoencodr"}, [], "Unknown method 'autoencodr'. Did you mean 'autoencoder'.*text_to_video"),
        ({"method": "no.such:Thing"}, [], "cannot be imported: No module named 'no'"),
        ({"method": "tests.training.tiny:TinyConfig"}, [], "is not a subclass of postgen.training.Trainer"),
        ({"method": ""}, [], "names no method"),
    ],
)
def test_mistakes(recipe, values, words, message):
    with pytest.raises(UserError, match=message):
        load_recipe(recipe(**values), words)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a list", "is a list: write 'key: value' lines"),
        ("", "is empty: write 'key: value' lines"),
        ("a word", "is one value: write 'key: value' lines"),
        (f"method: {TINY}", "recipe.yaml lacks output_dir: add 'output_dir: VALUE' to the recipe"),
        ("a: [", "is not valid YAML, line 1"),
        ("a: [1, 2\nb: 3", r"line 1, column 4: a bracket \[ is not closed"),
        ("a:\n\tb: 3", "line 2, column 1: there is a tab: use spaces, not tabs"),
        ("a: 1\na: 2", r"line 2, column 1: a is given twice\.$"),
        ("a: 'b", "line 1, column 4: a quote is not closed"),
        ("a: b: c", "line 1, column 5: there is a colon where none is allowed"),
        ("a: @b", "line 1, column 4: a value cannot begin with '@'"),
        ("a: !b 3", "line 1, column 4: could not determine a constructor for the tag"),
        ("a: \1", "is not valid YAML, unacceptable character"),
        ("max_steps: 3", "names no method"),
    ],
)
def test_files_that_are_no_recipe(recipe, text, message):
    with pytest.raises(UserError, match=message):
        load_recipe(recipe(text))


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"none.yaml cannot be read"):
        load_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_steps": 0}, "max_steps is 0, it must be at least 1"),
        ({"learning_rate": 0}, "learning_rate is 0.0, it must be above 0"),
        ({"ema_decay": 1.0}, r"ema_decay is 1.0, it must be in \[0, 1\)"),
        ({"seed": -1}, "seed is -1"),
        ({"save_total_limit": -1}, "save_total_limit is -1"),
        ({"output_dir": ""}, "output_dir is ''"),
        ({"report_to": ["mlflow"]}, "unknown tracker 'mlflow'. Known: tensorboard, trackio, wandb"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 3}, "warmup_steps is 3, it must be 0 when"),
        ({"max_grad_norm": True}, "max_grad_norm is True"),
    ],
)
def test_values_out_of_range(settings, message):
    with pytest.raises(UserError, match=message):
        TrainingConfig(**{"output_dir": "run", **settings})


def test_every_method_is_named_by_module_and_class():
    assert all(place.startswith("postgen.") and ":" in place for place in METHODS.values())


def test_exit_codes(recipe, capsys):
    assert main([]) == 2
    for words in (["--help"], [str(recipe()), "--help"]):
        assert main(words) == 0
        assert "usage: postgen train RECIPE " in capsys.readouterr().out
    assert main(["--max_steps", "3"]) == 2
    assert "The recipe comes first" in capsys.readouterr().err
    assert main([str(recipe()), "--wdith", "3"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("postgen: error: Unknown key 'wdith'")
    assert error.count("\n") == 1


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_an_interrupt_is_told_and_exits_by_its_signal(recipe, capsys, name, code):
    number = signal.Signals[name]
    # Set the default handler: under nohup, SIGHUP would be ignored.
    before = signal.signal(number, signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL)
    path = recipe(max_steps=9, signal_at=3, signal_name=name, disable_tqdm=True, report_to="none", device="cpu")
    try:
        assert main([str(path)]) == code
    finally:
        signal.signal(number, before)
    assert "interrupted after step 3; continue with --resume" in capsys.readouterr().err


def test_an_interrupt_before_the_first_step_names_the_newest_checkpoint(recipe, tmp_path, capsys, monkeypatch):
    path = recipe(max_steps=2, save_steps=1, disable_tqdm=True, report_to="none", device="cpu")
    start = lambda config: signal.raise_signal(signal.SIGINT)  # noqa: E731
    with monkeypatch.context() as patched:
        patched.setattr(TinyTrainer, "from_config", start)
        assert main([str(path)]) == 130
    assert capsys.readouterr().err == "postgen: stopped; there is no checkpoint yet: start the run again\n"
    assert main([str(path)]) == 0
    capsys.readouterr()
    monkeypatch.setattr(TinyTrainer, "from_config", start)
    assert main([str(path), "--resume", "--max_steps", "4"]) == 130
    newest = tmp_path / "run" / "checkpoint-2"
    message = f"postgen: stopped; the newest checkpoint, {newest}, is unchanged; continue with --resume\n"
    assert capsys.readouterr().err == message


def test_the_saved_config_of_a_resumed_run_does_not_resume_unasked(recipe, tmp_path, capsys):
    path = recipe(max_steps=2, disable_tqdm=True, report_to="none", device="cpu")
    assert main([str(path)]) == 0
    assert main([str(path), "--max_steps", "4", "--seed", "5", "--allow_changed", "seed", "--resume"]) == 0
    saved = tmp_path / "run" / "config.yaml"
    again = load_recipe(saved)[1]
    assert (again.resume_from_checkpoint, again.allow_changed, again.seed) == (None, [], 5)
    assert main([str(saved)]) == 2
    assert "holds the checkpoints of an earlier run" in capsys.readouterr().err
    assert main([str(saved), "--resume", "--max_steps", "5"]) == 0
    assert main([str(saved), "--resume", "maybe"]) == 2
    assert "'maybe', which is not a folder. --resume takes no value" in capsys.readouterr().err


def test_a_run_that_diverges_is_one_line(recipe, capsys):
    path = recipe(max_steps=9, nan_at=2, logging_steps=1, disable_tqdm=True, report_to="none", device="cpu")
    assert main([str(path)]) == 1
    assert capsys.readouterr().err.startswith("postgen: error: the loss of step 2 is not finite; lower learning_rate")
