"""A method can create any optimizer: it follows the learning rate schedule, and its resume is exact."""

import pytest
import torch
from transformers.optimization import Adafactor

from postgen.errors import UserError
from postgen.reconstruct.config import ReconstructConfig
from postgen.training.checkpoint_head import DamagedCheckpoint
from postgen.training.optimizers import PACKAGES, state_bytes
from tests.training.tiny import TinyConfig, TinyTrainer

SMALL = ("|step", "|RMS")
"""Names of numbers in the states of optimisers, which the estimate does not count."""


class Counting(torch.optim.Optimizer):
    """An optimizer with unusual state: a number in its group, a sum in another dtype, and a string."""

    def __init__(self, groups, lr):
        super().__init__(groups, {"lr": lr, "count": 0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["count"] += 1
            for parameter in group["params"]:
                state = self.state[parameter]
                state.setdefault("sum", torch.zeros_like(parameter, dtype=torch.float64)).add_(
                    parameter.grad, alpha=0.1
                )
                state["sign"] = "odd" if group["count"] % 2 else "even"
                rate = group["lr"] * (1 if state["sign"] == "odd" else 2) / group["count"]
                parameter.sub_((rate * state["sum"]).to(parameter.dtype))


BUILT = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9),
    # Adafactor has factored moments, and a step that is a plain number.
    "adafactor": lambda groups: Adafactor(groups, lr=1e-2, relative_step=False, scale_parameter=False),
    "counting": lambda groups: Counting(groups, lr=1e-2),
}


def make(folder, optimizer, **settings):
    class Trainer(TinyTrainer):
        def build_optimizer(self, groups):
            return BUILT[optimizer](groups)

    values = {"max_steps": 6, "save_steps": 3, "save_total_limit": None, "lr_scheduler_type": "linear", **settings}
    values |= {"device": "cpu", "disable_tqdm": True, "report_to": [], "ema_decay": 0.9}
    return Trainer(TinyConfig(output_dir=str(folder), **values))


@pytest.mark.parametrize("optimizer", list(BUILT))
def test_another_optimiser_resumes_exactly(tmp_path, optimizer):
    straight = make(tmp_path / "straight", optimizer)
    straight.train()
    assert type(straight.optimizer.optimizer).__name__.lower() == optimizer
    source = str(tmp_path / "straight" / "checkpoint-3")
    resumed = make(tmp_path / "resumed", optimizer, resume_from_checkpoint=source)
    resumed.train()
    for path in (tmp_path / "straight" / "checkpoint-6").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "resumed" / "checkpoint-6" / path.name).read_bytes(), path.name
    assert resumed.log.newest["learning_rate"] == straight.log.newest["learning_rate"] == 0
    first, last = straight.history[0], straight.history[-1]
    assert all(not torch.equal(first[name], last[name]) for name in first)
    kept = [dict(run.optimizer.param_groups[0], params=None) for run in (straight, resumed)]
    assert kept[0] == kept[1]


def test_the_checkpoint_of_another_optimiser_is_refused(tmp_path):
    make(tmp_path, "sgd", max_steps=3).train()
    with pytest.raises(UserError, match="written with SGD and 2 groups of parameters, this run has Counting and 2"):
        make(tmp_path, "counting", resume_from_checkpoint="latest").train()


def test_what_no_checkpoint_can_hold_is_told_after_the_first_step(tmp_path):
    run = make(tmp_path, "counting")
    build = run.build_optimizer

    def keeping(groups):
        made = build(groups)
        made.state[groups[0]["params"][0]]["generator"] = torch.Generator()
        return made

    run.build_optimizer = keeping
    with pytest.raises(
        UserError, match=r"Counting keeps 'generator' of net.0.weight as a Generator, which a checkpoint"
    ):
        run.train()
    assert run.global_step == 0


def test_an_optimiser_of_other_tensors_is_refused(tmp_path):
    run = make(tmp_path, "sgd")
    run.build_optimizer = lambda groups: torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=1.0)
    with pytest.raises(RuntimeError, match="SGD has tensors that are not trained parameters"):
        run.train()


def run_of(folder, optim, **settings):
    values = {"max_steps": 6, "save_steps": 3, "save_total_limit": None, "lr_scheduler_type": "linear", "width": 1024}
    values |= {
        "device": "cpu",
        "disable_tqdm": True,
        "report_to": [],
        "weight_decay": 0.01,
        "optim": optim,
        **settings,
    }
    return TinyTrainer(TinyConfig(output_dir=str(folder), **values))


@pytest.fixture
def eagerly():
    """Run functions that torchao compiles without the compiler, which would take a minute."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.mark.usefixtures("eagerly")
@pytest.mark.parametrize("optim", ["adafactor", *PACKAGES])
def test_every_optimiser_resumes_exactly_and_has_the_estimated_bytes(tmp_path, optim):
    if optim in PACKAGES:
        pytest.importorskip(PACKAGES[optim])
    straight = run_of(tmp_path / "straight", optim)
    straight.train()
    state = straight._parts.optimizer_state
    counted = sum(tensor.nbytes for name, tensor in state.tensors().items() if not name.endswith(SMALL))
    assert counted == pytest.approx(state_bytes(optim, list(straight.trained().values())), rel=0.1)
    source = str(tmp_path / "straight" / "checkpoint-3")
    resumed = run_of(tmp_path / "resumed", optim, resume_from_checkpoint=source)
    resumed.train()
    for path in (tmp_path / "straight" / "checkpoint-6").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "resumed" / "checkpoint-6" / path.name).read_bytes(), path.name
    first, last = straight.history[0], straight.history[-1]
    assert all(not torch.equal(first[name], last[name]) for name in first)


@pytest.mark.usefixtures("eagerly")
@pytest.mark.parametrize("optim", list(PACKAGES))
def test_eight_bits_learn_as_well_as_thirty_two(tmp_path, optim):
    pytest.importorskip(PACKAGES[optim])
    settings = {"max_steps": 40, "learning_rate": 1e-2, "logging_steps": 40, "dropout": 0.0, "width": 1024}
    runs = {name: run_of(tmp_path / name, name, **settings) for name in ("adamw", optim)}
    for run in runs.values():
        run.train()
    moved = {name: run.trained()["net.0.weight"].detach() for name, run in runs.items()}
    assert torch.nn.functional.cosine_similarity(*(each.flatten() for each in moved.values()), dim=0) > 0.99


def test_a_package_that_is_missing_is_named_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("postgen.training.optimizers.find_spec", lambda name: None)
    with pytest.raises(UserError, match="optim adamw_8bit needs torchao, which is not installed: pip install torchao"):
        run_of(tmp_path, "adamw_8bit")
    with pytest.raises(UserError, match="optim adamw_8bit needs torchao"):
        ReconstructConfig(output_dir=str(tmp_path), optim="adamw_8bit")


def test_sharding_by_the_launcher_needs_adamw(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="optim adafactor cannot be combined with sharded weights"):
        run_of(tmp_path, "adafactor")


def test_another_optimiser_cannot_resume_and_the_message_says_what_can(tmp_path):
    run_of(tmp_path / "first", "adamw").train()
    changed = {"resume_from_checkpoint": str(tmp_path / "first" / "checkpoint-3"), "allow_changed": ["optim"]}
    with pytest.raises(UserError, match=r"with AdamW and .* has Adafactor .* from its weights with init_from"):
        run_of(tmp_path / "second", "adafactor", **changed).train()


def test_settings_that_an_optimiser_does_not_have_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"adam_beta1 is 0\.5, it must be left out with optim: adafactor"):
        run_of(tmp_path, "adafactor", adam_beta1=0.5)
    with pytest.raises(UserError, match="optim adafactor cannot be combined with sharded weights"):
        run_of(tmp_path, "adafactor", fully_shard=True)


@pytest.mark.usefixtures("eagerly")
def test_a_damaged_packed_state_is_told(tmp_path):
    pytest.importorskip("torchao")
    run = run_of(tmp_path, "adamw_8bit")
    run.train()
    state = run._parts.optimizer_state
    tensors, values = state.tensors(), state.values()
    name = next(iter(values["packed"]))
    del tensors[f"{name}.scale"]
    with pytest.raises(DamagedCheckpoint, match=r"cannot be put together: 'scale'"):
        state.restore(tensors, values)
    values["packed"][name]["class"] = "os.system"
    with pytest.raises(DamagedCheckpoint, match="cannot be put together"):
        state.restore(state.tensors(), values)
