"""The reward of the toy model rises with every transition and with NFT, but not with shuffled advantages."""

import pytest

from postgen.grpo.nft import DiffusionNFTTrainer
from postgen.grpo.trainer import DanceGRPOTrainer
from tests.grpo.toy import ROWS, grpo


def rise(trainer) -> float:
    """Train; return the gain of the evaluation reward."""
    trainer.train()
    rewards = [row["eval_reward"] for row in trainer.callbacks.state.log_history if "eval_reward" in row]
    return rewards[-1] - rewards[0]


def run(folder, **changes) -> float:
    evaluation = {"eval_dataset": ROWS, "eval_on_start": True, "num_generations_eval": 8}
    steps = changes.get("max_steps", 40)
    return rise(grpo(folder, **{**evaluation, "max_steps": steps, "eval_steps": steps, **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {"sde_type": "dance", "noise_level": 0.6},
        {"sde_type": "flow"},
        {"sde_type": "exact", "sde_window_size": 2, "step_weighting": "inv_grad", "rollout_solver": "dpm++"},
        {"sde_type": "flow", "sde_window_size": 1, "ratio_norm": True, "share_initial_noise": True},
        {"sde_type": "flow_wan", "sde_window_size": 2, "reuse_graph": "retain"},
        {"sde_type": "flow", "policy_loss": "dppo", "steps_per_generation": 2},
        {"sde_type": "cps", "sde_window_size": 2, "sde_window_range": [0, 4]},
        {"sde_type": "ddim", "prediction_type": "epsilon"},
        {"sde_type": "ddim", "prediction_type": "v_prediction", "sde_window_size": 2},
        {"sde_type": "dance", "noise_level": 0.6, "best_of_n": 4, "steps_per_generation": 2, "num_iterations": 2},
    ],
    ids=lambda changes: "-".join(str(value) for value in changes.values()),
)
def test_grpo_learns(tmp_path, changes):
    assert run(tmp_path, **changes) > 0.3


def test_grpo_nft_learns(tmp_path):
    assert run(tmp_path, kind=DiffusionNFTTrainer, learning_rate=1e-2, max_steps=60, old_decay=0.2) > 0.3


@pytest.mark.parametrize("kind", [DanceGRPOTrainer, DiffusionNFTTrainer])
def test_grpo_does_not_learn_from_shuffled_advantages(tmp_path, kind):
    noise = {} if kind is DiffusionNFTTrainer else {"noise_level": 0.6}
    with pytest.warns(UserWarning, match="shuffle_advantages: a control experiment, in which nothing can be learned"):
        assert run(tmp_path, kind=kind, shuffle_advantages=True, **noise) < 0.15
    card = (tmp_path / "export" / "README.md").read_text()
    assert "**Control experiment, not a model for use:** the advantages were shuffled within each group" in card
