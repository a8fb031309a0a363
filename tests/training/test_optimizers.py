"""A method can create any optimizer: it follows the learning rate schedule, and its resume is exact."""

import pytest
import torch
from transformers.optimization import Adafactor

from postgen.errors import UserError
from tests.training.tiny import TinyConfig, TinyTrainer


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
