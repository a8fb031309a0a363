"""End-to-end distillation: loss, trained and shared weights, inputs of both networks, resuming, export."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from postgen.errors import UserError
from postgen.families import PredictionType
from postgen.lit import LitConfig, convert, load
from postgen.lit.distillation import Distillation, Terms, predicts_variance
from postgen.lit.student import is_new
from postgen.lit.train_config import LitTrainingConfig
from postgen.sampling.forward import noised, wanted_of
from postgen.sampling.schedule import Levels
from postgen.sampling.transition import split
from postgen.training import load_recipe
from postgen.training.distil_trainer import chance
from postgen.training.distillation import with_network
from tests.families.tiny_models import tiny_model
from tests.lit.distil import JOBS, PICTURES, ROWS, STAGES, VIDEO, conversion, distilled, teacher
from tests.training.pair import run_pair

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def state_of(run: Any, who: str) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in getattr(run.unwrap("distillation"), who).state_dict().items()}


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize("name", ["Wan", "CogVideoX"])
def test_all_softmax_has_nothing_to_learn(name: str, tmp_path: Path) -> None:
    """If every block stays softmax, the loss, the gradients and the changes of the weights are exactly 0."""
    values = {"conversion": {"layers": "all:softmax"}, "train": "all", "task_weight": 0.0, "hidden_weight": 1.0}
    run = distilled(tmp_path, name, **values)
    for row in log_of(tmp_path):
        assert (row["loss"], row["output_loss"], row["hidden_loss"], row["grad_norm"]) == (0, 0, 0, 0)
    assert same(state_of(run, "student"), state_of(run, "teacher"))


@pytest.mark.parametrize("name", [*VIDEO, *PICTURES])
def test_every_family(name: str, tmp_path: Path) -> None:
    """Two steps leave the teacher unchanged, and the export predicts bitwise what the student predicts."""
    before = {key: value.clone() for key, value in teacher(name)[0].transformer.state_dict().items()}
    run = distilled(tmp_path, name, hidden_weight=0.5)
    assert same(state_of(run, "teacher"), before)
    student = state_of(run, "student")
    changed = {key for key, value in student.items() if key not in before or not torch.equal(value, before[key])}
    assert any(is_new(key) for key in changed)
    assert any("to_q" in key for key in changed)
    assert all(".attn" in key for key in changed)
    # Copy the weights: tensors mapped from a file may be unaligned, and some kernels then round differently.
    loaded = copy.deepcopy(load(tmp_path / "export" / "transformer"))
    assert same(loaded.state_dict(), student)
    x = run.denoiser.initial_latents(1, **run.args.size, generator=torch.Generator().manual_seed(0))
    assert ("variance_loss" in log_of(tmp_path)[-1]) == (name in ("DiT", "PixArt-Sigma"))
    told, sigma = run._condition(run.rows[:1]), torch.tensor([0.5])
    whole = run.unwrap("distillation")
    with torch.no_grad():
        out = [
            with_network(run.denoiser, "transformer", each).predict(x, sigma, told)
            for each in (whole.student, loaded, whole.teacher)
        ]
    assert torch.equal(out[0], out[1])
    assert not torch.equal(out[0], out[2])


def test_what_is_not_trained_is_shared(tmp_path: Path) -> None:
    for place, (train, wanted) in enumerate({"new": 0, "attention": 2 * 10, "all": 10**9}.items()):
        whole: Any = distilled(tmp_path / train, train=train, max_steps=1).unwrap("distillation")
        theirs = dict(whole.teacher.named_parameters())
        own = {name: value for name, value in whole.student.named_parameters() if value is not theirs.get(name)}
        assert all(value.requires_grad and value.dtype == torch.float32 for value in own.values())
        assert not any(value.requires_grad for value in theirs.values())
        inherited = [name for name in own if not is_new(name)]
        assert len(inherited) == min(wanted, len(theirs)), (place, inherited)


def test_resume_is_exact(tmp_path: Path) -> None:
    """With transfer, LoRA, EMA and dropped captions: 4 steps equal 2 steps, a resume and 2 steps."""
    values = {**STAGES, "ema_decay": 0.9, "caption_dropout": 0.4, "max_steps": 4, "save_steps": 2, "eval_steps": 2}
    values |= {"save_total_limit": None}
    run = distilled(tmp_path / "a", **values)
    again = distilled(tmp_path / "b", **values, resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert same(state_of(run, "student"), state_of(again, "student"))
    exported = [load(tmp_path / name / "export" / "transformer").state_dict() for name in "ab"]
    assert same(*exported)
    rows = [{key: row[key] for key in row if "loss" in key} for row in log_of(tmp_path / "a")]
    assert rows[-len(log_of(tmp_path / "b")) :] == [
        {key: row[key] for key in row if "loss" in key} for row in log_of(tmp_path / "b")
    ]
    # The export has merged adapters, and the next stage starts from it.
    base = state_of(run, "teacher")
    changed = [key for key, value in exported[0].items() if key in base and not torch.equal(value, base[key])]
    assert changed
    assert all(key.rpartition(".")[0].endswith(("to_q", "to_k", "to_v", "to_out.0")) for key in changed)
    after = distilled(
        tmp_path / "next", student=str(tmp_path / "a" / "export" / "transformer"), train="new", max_steps=1
    )
    found = state_of(after, "student")
    assert all(torch.equal(found[key], value) for key, value in exported[0].items() if not is_new(key))
    assert same(state_of(after, "teacher"), base)


def test_captions_are_dropped_once_for_both(tmp_path: Path) -> None:
    shown: dict[str, list[Tensor]] = {"student": [], "teacher": []}

    class Watched(Distillation):
        def _said(self, who: str, x: Tensor, sigma: Tensor, condition: Any) -> Any:
            shown[who].append(condition["prompt"].clone())
            return super()._said(who, x, sigma, condition)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("postgen.lit.trainer.Distillation", Watched)
        run = distilled(tmp_path, caption_dropout=0.5, max_steps=8, train="new")
    assert all(torch.equal(a, b) for a, b in zip(*shown.values(), strict=True))
    empty = run._condition([{"prompt": ""}])["prompt"][0]
    dropped = [torch.equal(row, empty) for rows in shown["student"] for row in rows]
    assert dropped == [chance(run.args.seed, place) < 0.5 for place in range(16)]
    assert {*dropped} == {True, False}


def test_trajectories_and_finished_latents(tmp_path: Path) -> None:
    """The last stored state is the final latent that noise is added to; the others are states of the sampler."""
    finished = distilled(tmp_path / "a", max_steps=1).drawn["train"]
    run = distilled(tmp_path / "b", max_steps=1, states="trajectory", task_weight=0.0)
    drawn, steps = run.drawn["train"], run.schedule.steps
    for prompt, row in enumerate(ROWS):
        assert torch.equal(drawn.at(prompt, steps), finished.at(prompt, steps))
        x, told = drawn.at(prompt, 0)[None], run._condition([row])
        for step in range(steps):
            index = torch.tensor([step])
            out = run.denoiser.predict(x, run.schedule.sigmas[index].float(), told)
            x = x + wide_step(run.schedule.sigmas, step) * out
            torch.testing.assert_close(x[0], drawn.at(prompt, step + 1), rtol=1e-4, atol=1e-4)
    (tmp_path / "c").mkdir()
    (tmp_path / "b" / "latents").rename(tmp_path / "c" / "latents")
    with pytest.raises(UserError, match="holds latents of a run with other settings \\(kept\\)"):
        distilled(tmp_path / "c", max_steps=1)


def wide_step(sigmas: Tensor, step: int) -> float:
    return float(sigmas[step + 1] - sigmas[step])


@pytest.mark.parametrize("kind", ["flow", "epsilon", "v_prediction", "sample"])
def test_what_the_task_wants(kind: PredictionType) -> None:
    """The target of the task loss is the prediction from which `split` returns the clean latents and the noise."""
    torch.manual_seed(0)
    clean, noise = torch.randn(2, 3, 4, 4, 4, dtype=torch.float64)
    s = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    bars = None if kind == "flow" else 1 - s
    levels = Levels(s=s, after=s / 2, second=s[1], alpha_bar=bars, alpha_bar_after=bars)
    wanted = wanted_of(clean, noise, levels, kind)
    found = split(noised(clean, noise, levels), wanted, levels, kind)
    torch.testing.assert_close(found, (clean, noise))


class DiTDenoiser:
    """A denoiser of DiT, whose output has the channels of the noise and those of the variance."""

    prediction_type, frame_axis = "epsilon", None

    def __init__(self, tiny: Any) -> None:
        self.tiny, self.transformers = tiny, {"transformer": tiny.transformer}

    def predict(self, x: Tensor, sigma: Tensor, condition: Any, guidance: float = 1.0) -> Tensor:
        given = {**self.tiny.arguments, "hidden_states": x}
        out: Tensor = self.transformers["transformer"](**given, return_dict=False)[0]
        return out[:, : x.shape[1]]


def test_the_variance_of_models_that_predict_one(tmp_path: Path) -> None:
    tiny = tiny_model("DiT", batch=2)
    kind: Any = type(tiny.transformer)
    assert not predicts_variance(tiny.transformer)
    channels = tiny.transformer.config.in_channels
    tiny = replace(tiny, transformer=kind.from_config(tiny.transformer.config, out_channels=2 * channels).eval())
    assert predicts_variance(tiny.transformer)
    student: Any = copy.deepcopy(tiny.transformer)
    convert(student, LitConfig(layers="1:anchor"))
    x = tiny.arguments["hidden_states"]
    terms = Terms(task=0, output=0.5, variance=0.05, hidden=0)
    whole = Distillation(student, tiny.transformer, DiTDenoiser(tiny), "transformer", terms)  # type: ignore[arg-type]
    loss, found = whole(x, torch.ones(2), {})
    with torch.no_grad():
        difference = student(**tiny.arguments, return_dict=False)[0] - tiny()
    noise, variance = difference.chunk(2, dim=1)
    torch.testing.assert_close(found["output"], noise.square().mean())
    torch.testing.assert_close(found["variance"], variance.square().mean())
    torch.testing.assert_close(loss, 0.5 * noise.square().mean() + 0.05 * variance.square().mean())
    assert found["variance"] > 0
    with pytest.raises(UserError, match="WanTransformer3DModel predicts no variance"):
        distilled(tmp_path, variance_weight=0.05)


def test_two_processes_are_one(tmp_path: Path) -> None:
    """Two processes, also with sharded weights, train the weights of one process with twice the accumulation."""
    run_pair("tests.lit.distil:JOBS", tmp_path)
    assert len(JOBS) == 2
    distilled(tmp_path / "one", **STAGES, gradient_accumulation_steps=2)
    distilled(tmp_path / "whole", ema_decay=0.9, gradient_accumulation_steps=2)
    for pair, one in (("two", "one"), ("cut", "whole")):
        found, wanted = (load(tmp_path / name / "export" / "transformer").state_dict() for name in (pair, one))
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"conversion": {"layer": "all:lit"}}, "LitConfig has no setting layer"),
        ({"conversion": "all:lit"}, "must be a mapping of LitConfig settings"),
        ({"student": "x", "conversion": {"layers": "all:lit"}}, "left out with student"),
        ({"task_weight": 0.0, "output_weight": 0.0, "variance_weight": 0.0}, "above 0, or another weight"),
        ({"states": "trajectory"}, "task_weight is 1.0, it must be 0 with states"),
        ({"use_peft": True}, "train is 'attention', it must be new with use_peft"),
        ({"init_from": "x"}, "name a converted transformer as student"),
        ({"lora_path": "x"}, "lora_path is 'x'"),
        ({"transfer_steps": 1, "transfer_prompts": 1}, "more than held_out_prompts"),
        ({"caption_dropout": 2.0}, "from 0 to 1"),
    ],
)
def test_wrong_settings(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        LitTrainingConfig(output_dir="x", num_frames=1, height=8, width=8, **changes)


def test_projections_that_begin_anew(tmp_path: Path) -> None:
    run = distilled(tmp_path, conversion=conversion("Wan", inherit="output"))
    student = state_of(run, "student")
    assert sum(".fresh." in key for key in student) == 12
    assert same(load(tmp_path / "export" / "transformer").state_dict(), student)
    assert not any("fresh" in key for key in state_of(run, "teacher"))


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    """Gradient checkpointing keeps the trained weights equal, with layer type `lit` and the loss on block outputs."""
    values = {"hidden_weight": 0.5, "train": "new"}
    runs = [distilled(tmp_path / str(on), "FLUX", gradient_checkpointing=on, **values) for on in (False, True)]
    assert same(*(state_of(run, "student") for run in runs))


def test_refused(tmp_path: Path) -> None:
    for changes, said in (
        ({"conversion": {"layers": "1:window_delta"}, "train": "new"}, "softmax on 3 latent frames"),
        (
            {"conversion": conversion("Wan", inherit="output"), "train": "new", "use_peft": True},
            "initialises them anew",
        ),
        ({"student": str(tmp_path)}, r"has no config\.json"),
    ):
        with pytest.raises(UserError, match=said):
            distilled(tmp_path / "run", **changes)
    pipe, _ = teacher("Wan")
    pipe.transformer.to(torch.bfloat16)
    with pytest.raises(UserError, match=r"are torch\.bfloat16, but trained weights are float32: set bf16"):
        distilled(tmp_path / "run", pipe=pipe)


def test_recipes() -> None:
    for name in ("lit-tiny-wan", "lit-tiny-wan-lora", "lit-wan"):
        trainer, args = load_recipe(RECIPES / f"{name}.yaml", ["--max_steps", "3"])
        assert trainer.__name__ == "LitTrainer"
        assert isinstance(args, LitTrainingConfig)
        assert bool(args.student) != bool(args.conversion)
