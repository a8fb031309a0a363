"""The estimate of the memory of a step: activations counted by shapes, savings, the table of a dry run."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from postgen.errors import UserError
from postgen.families.activations import training_memory
from postgen.grpo.nft import DiffusionNFTTrainer
from postgen.training.block_offload import BlockOffload
from postgen.training.memory import CARDS, GIGA, Saving, memory_plan, memory_table
from postgen.training.memory_config import MemoryConfig
from postgen.training.modes import checkpoint_gradients
from postgen.training.policy import load_policy
from postgen.training.updates import UpdatesConfig
from tests.grpo.test_lora import video_run
from tests.toy_diffusers import ToyTransformer3DModel
from tests.training.test_block_offload import blocks, call, gradients, made

CPU = torch.device("cpu")
SIZE = {"num_frames": 5, "height": 16, "width": 16}


class Layers(nn.Module):
    """Layers of squares, without weights that autograd keeps."""

    def __init__(self, count, checkpointing=False):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.count, self.checkpointing = count, checkpointing

    def forward(self, x):
        def layer(x):
            return x.square().square()

        x = x * self.gain
        for _ in range(self.count):
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointing else layer(x)
        return x


def test_activations_are_those_that_autograd_keeps():
    x = {"x": torch.zeros(1024)}
    one = 4096
    # Each square keeps its input; gradients and temporaries are a constant number of tensors beside.
    found = [training_memory(Layers(count), x) for count in (8, 16, 32)]
    assert found[1] - found[0] == 16 * one
    assert found[2] - found[1] == 32 * one
    assert 16 * one <= found[0] <= 22 * one
    kept = [training_memory(Layers(count, checkpointing=True), x) for count in (8, 16, 32)]
    assert kept[1] - kept[0] == 8 * one
    assert kept[2] - kept[1] == 16 * one
    assert training_memory(Layers(8), x, passes=2) == pytest.approx(2 * found[0], rel=0.2)
    halves = training_memory(Layers(8), {"x": torch.zeros(1024, dtype=torch.bfloat16)})
    assert halves < 0.7 * found[0]


ARGUMENTS = {
    "hidden_states": torch.zeros(1, 4, 3, 8, 8),
    "timestep": torch.full((1,), 500.0),
    "encoder_hidden_states": torch.zeros(1, 5, 16),
}


@pytest.fixture(scope="module")
def counted():
    """The count of a network of two blocks."""
    return training_memory(made(layers=2), ARGUMENTS)


def test_counting_computes_nothing_and_changes_nothing(counted):
    model = made(layers=2)
    before = {name: (id(value), value.clone()) for name, value in model.named_parameters()}
    wide = {name: value.repeat(4, *[1] * (value.dim() - 1)) for name, value in ARGUMENTS.items()}
    assert training_memory(model, wide) > 2 * counted
    after = {name: (id(value), value) for name, value in model.named_parameters()}
    assert all(before[name][0] == after[name][0] and torch.equal(before[name][1], after[name][1]) for name in before)
    assert all(value.grad is None for value in model.parameters())
    assert torch.equal(call(model), call(made(layers=2)))


def test_a_network_without_memory_counts_the_same(counted):
    assert training_memory(made(layers=2).to("meta"), ARGUMENTS) == counted


def test_offloaded_blocks_do_not_disturb_the_count(counted):
    model = made(layers=2)
    offload = BlockOffload(model, blocks(model), CPU)
    assert training_memory(model, ARGUMENTS, around=offload.paused) == counted
    assert offload.copies == 0
    assert all(
        torch.equal(a, b) for a, b in zip(gradients(model).values(), gradients(made(layers=2)).values(), strict=True)
    )


class Branching(nn.Module):
    """A network whose shapes depend on values."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x[x * self.gain > 0] * self.gain


def test_shapes_that_depend_on_values_are_one_line():
    with pytest.raises(UserError, match="activations of a Branching cannot be counted without computing them"):
        training_memory(Branching(), {"x": torch.ones(3)})


def plan_of(folder, **settings):
    memory = MemoryConfig(lora_r=2, max_sequence_length=16, **settings)
    policy = load_policy(str(folder), memory, memory, CPU, memory=memory)
    return memory_plan(policy.pipe, policy.denoiser, memory, UpdatesConfig(), size=SIZE, rows=2), policy


@pytest.fixture(scope="module")
def loaded(tiny_wan):
    return plan_of(tiny_wan)


def test_sizes_are_those_of_the_loaded_model(loaded):
    plan, policy = loaded
    network = policy.denoiser.transformers["transformer"]
    assert plan.network == sum(each.nbytes for each in (*network.parameters(), *network.buffers()))
    trained = sum(each.numel() for each in network.parameters() if each.requires_grad)
    assert plan.training(plan.now) == 12 * trained
    assert plan.training(Saving(optim="adamw_8bit")) <= plan.training(plan.now)
    assert set(plan.others) == {"text_encoder", "vae"}
    assert 0 < plan.activations[True] < plan.activations[False]
    expected = plan.network + sum(plan.others.values()) + 12 * trained + plan.activations[False]
    assert plan.step(plan.now) == expected
    assert not network.is_gradient_checkpointing
    assert not network.training


def test_every_saving_needs_less(loaded):
    plan, _ = loaded
    # Blocks of a large network: two buffers are more than a network of two blocks has.
    many = dataclasses.replace(plan, blocks=plan.blocks[:1] * 30, network=plan.network + 29 * plan.blocks[0])
    ladder = many.ladder()
    assert list(ladder)[:2] == ["as configured", "+ gradient_checkpointing: true"]
    assert list(ladder)[-1] == "+ offload_blocks: 30"
    peaks = [many.needed(saving) for saving in ladder.values()]
    assert peaks == sorted(peaks, reverse=True)
    # All savings that are on already: nothing is left to propose.
    now = Saving(gradient_checkpointing=True, offload_frozen=True, offload_blocks=2)
    assert list(dataclasses.replace(plan, now=now).ladder()) == [
        "as configured",
        "+ optim: adamw_8bit",
        "+ base_quant: int8",
    ]


def test_the_estimate_of_a_saving_is_that_of_the_model_with_it(loaded, tiny_wan, monkeypatch):
    plan, _ = loaded
    monkeypatch.setattr("postgen.training.memory._activations", lambda *given: {})  # only weights are compared
    real, _ = plan_of(tiny_wan, base_quant="int8")
    guessed, found = plan.weights(dataclasses.replace(plan.now, base_quant="int8")), real.weights(real.now)
    assert guessed == pytest.approx(found, rel=0.1)


def test_the_table_names_the_cards(loaded):
    plan, _ = loaded
    large = dataclasses.replace(plan, extra=15 * GIGA)
    lines = memory_table(large).splitlines()
    assert lines[0].split()[-2 * len(CARDS) :] == [word for size in CARDS for word in (str(size), "GB")]
    assert lines[1].split()[-4:] == ["-", "-", "-", "yes"]
    assert memory_table(dataclasses.replace(plan, activations={}, reason="why")) == "not counted: activations (why)"


def test_savings_that_the_run_excludes_are_not_proposed(loaded):
    plan, _ = loaded
    assert not plan.excluded
    proposed = dataclasses.replace(plan, excluded=frozenset(("optim", "offload_blocks"))).ladder()
    assert [name.split(":")[0] for name in proposed] == [
        "as configured",
        "+ gradient_checkpointing",
        "+ offload_frozen",
        "+ base_quant",
    ]


def test_the_expert_that_is_trained_is_counted(loaded, monkeypatch):
    plan, policy = loaded
    found = []
    monkeypatch.setattr("postgen.training.memory._activations", lambda *given: found.append(given[1]) or {})
    networks = policy.denoiser.transformers
    experts = {"transformer": made(layers=1, adapted=False), "transformer_2": networks["transformer"]}
    monkeypatch.setattr(policy.denoiser, "transformers", experts)
    memory = MemoryConfig(lora_r=2, max_sequence_length=16)
    memory_plan(policy.pipe, policy.denoiser, memory, UpdatesConfig(), size=SIZE, rows=2)
    assert found == [networks["transformer"]]
    assert plan.activations


def test_a_dry_run_prints_it(tiny_wan, tmp_path, capsys):
    settings = {"offload_blocks": 2, "gradient_checkpointing": True, "base_quant": "fp8"}
    found = video_run(tiny_wan, tmp_path, DiffusionNFTTrainer, dry_run=True, **settings).train()
    told = capsys.readouterr().out
    assert "peak memory " in told
    assert "as configured" in told
    assert found.metrics["bytes/step"] > found.metrics["bytes/activations"] > 0
    assert not (tmp_path / "run").exists()


def test_a_model_without_checkpointing_is_told_at_once():
    model = ToyTransformer3DModel()
    with pytest.raises(UserError, match="a ToyTransformer3DModel does not support it: set it to false"):
        checkpoint_gradients(model)
