"""The trainers: batches, invalid input, rewards, evaluation, guards, written files."""

import json
import resource

import pytest
import torch
from transformers import TrainerCallback

from postgen.errors import UserError
from postgen.grpo.batches import Batches
from postgen.grpo.evaluation import combined
from postgen.grpo.guards import HackingGuard, check_groups
from postgen.grpo.nft import DiffusionNFTTrainer
from postgen.grpo.trainer import DanceGRPOTrainer
from postgen.rewards import AllRewardsFailed, RewardRunner
from postgen.training import load_recipe
from postgen.training.prompts import Prompts
from tests.grpo.toy import ROWS, grpo, lines, lines_of, near, settings
from tests.sampling.toy import PointPipeline

# Batches.


@pytest.mark.parametrize(
    ("changes", "updates", "samples"),
    [
        ({}, 1, 16),
        ({"steps_per_generation": 3}, 3, 48),
        ({"generation_batch_size": 32}, 2, 32),
        ({"best_of_n": 4}, 1, 32),
        ({"best_of_n": 4, "generation_batch_size": 64}, 2, 64),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 4}, 2, 16),
    ],
)
def test_grpo_batches(tmp_path, changes, updates, samples):
    batches = Batches.of(settings(tmp_path, **changes), 1, 0)
    assert (batches.updates, batches.samples) == (updates, samples)
    assert batches.mine() == list(range(samples))


@pytest.mark.parametrize("changes", [{}, {"steps_per_generation": 2}, {"best_of_n": 4, "steps_per_generation": 2}])
def test_grpo_processes_share_each_update(tmp_path, changes):
    alone = Batches.of(settings(tmp_path, gradient_accumulation_steps=1, **changes), 1, 0)
    half = {"per_device_train_batch_size": 8, **changes}
    parts = [Batches.of(settings(tmp_path, **half), 2, rank).mine() for rank in (0, 1)]
    assert sorted(parts[0] + parts[1]) == alone.mine()
    size = len(alone.mine()) // alone.updates
    for update in range(alone.updates):
        low, part = update * size, size // 2
        both = [rank[update * part : (update + 1) * part] for rank in parts]
        assert sorted(both[0] + both[1]) == list(range(low, low + size))


def test_grpo_groups_may_span_processes(tmp_path):
    parts = [
        Batches.of(settings(tmp_path, per_device_train_batch_size=6, num_generations=4), 2, rank).mine()
        for rank in (0, 1)
    ]
    assert parts == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_generations": 1}, "num_generations is 1, it must be at least 2"),
        (
            {"num_generations": 5},
            r"trains on 16 samples .* multiple of num_generations, which is 5. Use num_generations 4 or 8",
        ),
        ({"generation_batch_size": 20}, "generation_batch_size is 20: it must be a multiple of num_generations 8"),
        ({"generation_batch_size": 24}, "its 24 samples to train on must be a multiple of 16"),
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 3}, "must be a multiple of gradient_accumulation"),
        ({"best_of_n": 3, "steps_per_generation": 3}, "so that no prompt is split"),
        ({"steps_per_generation": 1, "generation_batch_size": 16}, "left out when steps_per_generation"),
        ({"best_of_n": 9}, "best_of_n is 9, it must be in 2..num_generations"),
        ({"sde_window_size": 8}, "sde_window_size is 8, it must be in 1..7: the last step has no noise"),
        ({"sde_window_range": [3, 9]}, "must be .first, stop. with 0 <= first < stop <= 7"),
        ({"sde_type": "ode"}, "one of the others: ode has no noise"),
        ({"sde_type": "cps", "ratio_norm": True}, "another than cps with ratio_norm"),
        ({"sde_type": "ddim"}, "'ddim' is not for a model that predicts flow"),
        ({"reward_funcs": ["a"], "reward_weights": [1.0, 2.0]}, "one number for each of reward_funcs"),
        ({"rows": [{"text": "a"}]}, "row 0 of train_dataset has no column 'prompt', it has text"),
        ({"rows": []}, "train_dataset has no rows"),
        ({"rows": "nowhere.jsonl"}, "train_dataset nowhere.jsonl cannot be read"),
        ({"rows": "postgen.nothing:rows"}, "train_dataset 'postgen.nothing:rows' cannot be imported"),
        ({"rows": None}, "there are no prompts: give train_dataset"),
        ({"reward": []}, "there is no reward: give reward_funcs"),
        ({"reward": "wrold"}, "wrold"),
        (
            {"beta": 0.1, "init_from": "."},
            "init_from with beta or a guard above 0: the reference policy would not have the weights",
        ),
        ({"fully_shard": True, "sde_window_size": 2}, "sharded training needs sde_window_per: rollout"),
        ({"fully_shard": True}, "fully_shard shards the model over processes, but there is only one"),
        ({"height": None}, "height is not given, and PointPipeline has no default"),
    ],
)
def test_grpo_bad_input(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        grpo(tmp_path, **changes).train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_grpo_unknown_key_of_a_recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"method: dancegrpo\noutput_dir: {tmp_path}/run\nnum_generation: 4\n")
    with pytest.raises(UserError, match=r"Unknown key 'num_generation' in .* Did you mean 'num_generations'"):
        load_recipe(path)


def test_grpo_jsonl_lines_are_checked(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": \n')
    with pytest.raises(UserError, match=r"line 2: it is not valid JSON"):
        grpo(tmp_path / "run", rows=str(path))
    path.write_text('{"prompt": [{"role": "user", "content": "said"}], "target": 3}\n\n')
    assert grpo(tmp_path / "run", rows=str(path)).prompts.rows == [{"prompt": "said", "target": 3}]
    path.write_text('{"prompt": [{"role": "user"}]}\n')
    with pytest.raises(UserError, match=r"line 1: the prompt is \[{'role': 'user'}\], it must be a text"):
        grpo(tmp_path / "run", rows=str(path))


def test_grpo_data_sets_may_name_a_split(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    folder = tmp_path / "prompts"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text(json.dumps({"prompt": split}) + "\n")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for name, split in ((str(folder), "train"), (f"{folder}:test", "test")):
        prompts = Prompts(name, "train_dataset", seed=0, shuffle=False)
        assert [row["prompt"] for row in prompts.rows] == [split]
    with pytest.raises(UserError, match="cannot be loaded"):
        Prompts(f"{folder}:other", "train_dataset", seed=0, shuffle=False)


# Rewards.


def test_grpo_rewards_get_columns_and_failures_are_survived(tmp_path):
    seen = []

    def picky(prompts, completions, number, trainer_state, latents, fps):
        seen.append((list(number), trainer_state.global_step, latents.shape, fps))
        assert [len(prompt) for prompt in prompts] == list(number)
        return [None if n == 3 else -(clip - 1).square().mean() for n, clip in zip(number, completions, strict=True)]

    def failing(completions):
        raise RuntimeError("out of order")

    run = grpo(tmp_path, reward=[picky, failing], reward_weights=[1.0, 0.5], max_steps=4, reward_patience=0)
    run.train()
    assert len(seen) == 4
    assert seen[1][1:3] == (1, torch.Size([16, 3, 1, 2, 2]))
    assert sorted(run.prompts.at(position)["number"] for position in range(8)) == list(range(1, 9))
    rows = lines(run)
    assert {row["rewards/failing/failed"] for row in rows} == {16.0}
    assert {row["rewards/picky/failed"] for row in rows} == {0.0, 8.0}
    # A prompt without rewards has no spread.
    assert [row["frac_reward_zero_std"] for row in rows if row["rewards/picky/failed"]] == [0.5]


def test_grpo_rewards_that_cannot_score_are_found_before_the_first_update(tmp_path):
    def gold(completions, target):
        return [0.0 for _ in completions]

    with pytest.raises(UserError, match="the reward gold needs the column 'target', the data has number"):
        grpo(tmp_path, eval_dataset=ROWS, eval_reward_funcs=gold)
    for asked in ({"eval_reward_funcs": near}, {"merge_last": 2, "merge_metric": "reward", "save_steps": 1}):
        with pytest.raises(UserError, match="eval_on_start and evaluate_only need held-out prompts"):
            grpo(tmp_path, **asked)
    with pytest.raises(UserError, match="nowhere"):
        grpo(tmp_path, eval_dataset=ROWS, eval_reward_funcs=f"clip_score(model={tmp_path / 'nowhere'})").train()
    assert not (tmp_path / "metrics.jsonl").exists()


def test_grpo_groupwise_rewards_want_whole_groups(tmp_path):
    def spread(completions):
        return [0.0 for _ in completions]

    spread.groupwise = True
    runner = RewardRunner(spread)
    check_groups(runner, Batches.of(settings(tmp_path), 2, 0))
    split = settings(tmp_path, per_device_train_batch_size=4)
    check_groups(RewardRunner(near), Batches.of(split, 2, 0))
    with pytest.raises(UserError, match=r"spread compares all samples .* \(4\) a multiple of num_generations \(8\)"):
        check_groups(runner, Batches.of(split, 2, 0))


def test_grpo_rewards_get_a_column_that_a_batch_lacks(tmp_path):
    seen = []

    def graded(completions, target):
        seen.append(target[0])
        return near(completions)

    rows = [{"prompt": "a", "target": 1}, {"prompt": "b"}]
    grpo(tmp_path, reward=graded, rows=rows, per_device_train_batch_size=8, shuffle_dataset=False).train()
    assert seen == [1, None]


def test_grpo_reward_that_always_fails_ends_the_run(tmp_path):
    def failing(completions):
        raise RuntimeError("out of order")

    with pytest.raises(AllRewardsFailed, match="every reward failed on every one of 16 samples of step 1"):
        grpo(tmp_path, reward=failing).train()
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize(("patience", "weight", "calls"), [(1, 1.0, 1), (2, 1.0, 4), (0, 1.0, 6), (1, 0.0, 6)])
def test_grpo_a_second_reward_that_dies_ends_the_run(tmp_path, patience, weight, calls):
    """The reward succeeds only in the second rollout, so two rollouts in a row fail with the fourth."""
    times = []

    def second(completions):
        times.append(len(times) + 1)
        if times[-1] != 2:
            raise RuntimeError("out of order")
        return [0.0] * len(completions)

    changes = {"reward_patience": patience, "reward_weights": [1.0, weight], "max_steps": 6}
    run = grpo(tmp_path, reward=[near, second], **changes)
    if calls == 6:
        run.train()
    else:
        with pytest.raises(AllRewardsFailed, match=f"the reward second has scored no sample in {patience} rollouts"):
            run.train()
    assert len(times) == calls


def test_grpo_best_of_n_trains_on_the_extremes(tmp_path):
    run = grpo(tmp_path, best_of_n=4, max_steps=1, reward=lambda completions: list(range(32)))
    run.train()
    kept = [sample % 8 for sample in run.buffer.samples]
    assert kept == [0, 1, 6, 7] * 4
    assert sorted(run.buffer.prompts) == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4


# Evaluation and files.


def test_grpo_evaluation_is_fixed_and_measures_gold(tmp_path):
    def gold(completions):
        return [clip.mean() for clip in completions]

    run = grpo(
        tmp_path, eval_dataset=ROWS, eval_on_start=True, eval_steps=1, eval_reward_funcs=[gold], max_steps=1,
        num_generations_eval=2, learning_rate=1e-9,
    )  # fmt: skip
    run.train()
    first, last = (row for row in lines(run) if "eval_reward" in row)
    assert first["eval_samples"] == 16
    assert first["eval_reward"] == pytest.approx(last["eval_reward"], rel=1e-4)
    assert {"eval_gold/gold/mean", "eval_rewards/near/mean", "eval_brightness", "eval_sharpness"} <= first.keys()
    assert first["eval_diversity"] > 0.1
    assert (first["eval_hacking"], first["eval_cost/forward_equivalents"]) == (0, 0)
    assert last["eval_cost/forward_equivalents"] == 16 * 8 + 3 * 16 * 7


def test_grpo_hacking_guard():
    guard = HackingGuard(2)
    assert [guard.see(*pair) for pair in [(1, 5), (2, 4), (3, 4.5), (4, 4), (5, 3)]] == [False] * 4 + [True]
    again = HackingGuard(2)
    again.load(**guard.state())
    assert again.see(6, 2)
    assert not HackingGuard(0).see(1, 1)


def test_grpo_hacking_guard_speaks_up_only_when_the_two_part():
    guard = HackingGuard(2)
    assert not any(guard.see(k / 10, k / 10) for k in range(5))
    assert not guard.see(0.1, 0.1)  # both rewards fell, so this is no reward hacking
    assert not guard.see(0.6, 0.05)
    assert guard.see(0.7, 0.02)
    assert not guard.see(0.8, float("inf"))


def test_grpo_stops_when_the_gold_reward_falls(tmp_path):
    def gold(completions):
        return [(clip - 1).square().mean() for clip in completions]

    run = grpo(
        tmp_path, eval_dataset=ROWS, eval_steps=5, eval_reward_funcs=[gold], max_steps=100, on_hacking="stop",
        num_generations_eval=4,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="reward hacking"):
        result = run.train()
    assert result.global_step < 100
    assert lines(run)[-1]["eval_hacking"] == 1


def test_grpo_log_has_trls_names(tmp_path):
    run = grpo(tmp_path, log_completions=True, max_steps=1, beta=0.1)
    run.train()
    assert {
        *("reward", "reward_std", "rewards/near/mean", "rewards/near/std", "frac_reward_zero_std", "policy_loss"),
        *("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "kl", "ratio/mean", "approx_kl"),
        *("timing/rollout", "timing/decode", "timing/reward", "nfe/rollout", "nfe/train", "step_time", "grad_norm"),
        *("advantage/abs_mean", "diversity/latent_pairwise", "learning_rate", "logp_diff/max"),
    } <= lines(run)[0].keys()
    table = [json.loads(line) for line in (tmp_path / "completions" / "step-000000.jsonl").read_text().splitlines()]
    assert len(table) == 16
    assert set(table[0]) == {"step", "prompt", "near", "advantage"}
    assert sum(row["advantage"] for row in table) == pytest.approx(0, abs=1e-4)
    assert len(list((tmp_path / "completions").glob("*.png"))) == 4


def test_grpo_disk_full_while_saving_leaves_no_half_checkpoint(tmp_path):
    class Full(TrainerCallback):
        def on_step_end(self, args, state, control, **extra):
            if state.global_step == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limit[1]))

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    run = grpo(tmp_path, max_steps=3, save_steps=1, callbacks=[Full()])
    try:
        with pytest.raises(UserError, match=r"checkpoint-2 cannot be written.*continue from the last checkpoint"):
            run.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [path.name for path in tmp_path.glob("*checkpoint-*")] == ["checkpoint-1"]
    grpo(tmp_path, max_steps=3, resume_from_checkpoint="latest").train()


def test_grpo_dry_run_prints_an_estimate(tmp_path, capsys):
    result = grpo(tmp_path, dry_run=True, max_steps=10, sde_window_size=2).train()
    told = capsys.readouterr().out
    assert "2 prompts x 8 samples per rollout, 1 update per rollout, 10 in total" in told
    assert "forward_equivalents/run" in told
    assert result.global_step == 0
    assert not tmp_path.joinpath("metrics.jsonl").exists()
    window = {"sde_window_size": 2, "sde_window_range": [3, 5], "share_initial_noise": True, "max_steps": 2}
    guess = grpo(tmp_path / "guess", dry_run=True, **window).train()
    run = grpo(tmp_path / "run", **window)
    run.train()
    assert guess.metrics["forward_equivalents/run"] == pytest.approx(run.meter.forward_equivalents)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (DanceGRPOTrainer, {"beta": 0.1, "num_iterations": 2, "steps_per_generation": 1}),
        (DiffusionNFTTrainer, {"beta": 0.1}),
        (DiffusionNFTTrainer, {"beta": 0.0, "guidance_scale": 3.0, "train_timesteps": 2}),
    ],
)
def test_grpo_dry_run_counts_the_passes_of_other_policies(tmp_path, kind, changes):
    guess = grpo(tmp_path / "guess", kind=kind, dry_run=True, **changes).train()
    run = grpo(tmp_path / "run", kind=kind, **changes)
    run.train()
    assert guess.metrics["forward_equivalents/run"] == pytest.approx(run.meter.forward_equivalents)
    assert lines(run)[0]["nfe/train"] == guess.metrics["passes/train_per_sample"]
    weights = guess.metrics["trained_parameters"] * 4
    copies = int(kind is DiffusionNFTTrainer) + int(changes["beta"] > 0)
    assert guess.metrics["bytes/training"] == (3 + copies) * weights


def test_grpo_takes_from_the_configuration_what_is_not_given(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n')
    both = {"train_dataset": str(prompts), "eval_dataset": str(prompts)}
    args = settings(tmp_path, **both, reward_funcs=["motion_floor"], eval_reward_funcs=["parabola"], model="a/b")
    run = DanceGRPOTrainer(args=args)
    assert (run.source, run.runner.names, run.gold.names) == ("a/b", ("motion_floor",), ("parabola",))
    assert (len(run.prompts), len(run.eval_prompts)) == (1, 1)
    run = DanceGRPOTrainer(PointPipeline(), near, args, ROWS)
    assert (type(run.source), run.runner.names, len(run.prompts)) == (PointPipeline, ("near",), 8)


def test_grpo_evaluation_alone_prints_its_numbers(tmp_path, capsys):
    grpo(tmp_path, evaluate_only=True, eval_dataset=ROWS).train()
    told = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert float(told["eval_reward"]) == pytest.approx(lines_of(tmp_path)[0]["eval_reward"], rel=1e-3)
    with pytest.raises(UserError, match="need held-out prompts: give eval_dataset"):
        grpo(tmp_path, evaluate_only=True)


def test_grpo_evaluation_keeps_to_the_batch_size_and_adds_costs_of_processes(tmp_path):
    run = grpo(tmp_path, evaluate_only=True, eval_dataset=ROWS, num_generations_eval=8, rollout_batch_size=3)
    sizes = []
    run.build()
    run.policy.modules["transformer"].register_forward_pre_hook(lambda module, given: sizes.append(len(given[0])))
    run.evaluator.run(run.eval_prompts.rows)
    assert max(sizes) == 3
    spent = [{"forward_equivalents": 3.0, "transformer_seconds": 1.0}, {"forward_equivalents": 4.0}]
    spent[1]["transformer_seconds"] = 0.5
    means = combined([([{"reward": 1.0}], [], spent[0]), ([{"reward": 2.0}], [], spent[1])])
    assert (means["reward"], means["cost/forward_equivalents"], means["cost/transformer_seconds"]) == (1.5, 7, 1.5)


def test_grpo_card_shows_before_only_what_was_before(tmp_path):
    run = grpo(tmp_path, eval_dataset=ROWS, eval_steps=1, eval_grid=1, max_steps=1)
    run.train()
    assert {path.name for path in (tmp_path / "export").glob("*.png")} == {"after.png"}
    card = (tmp_path / "export" / "README.md").read_text()
    assert "# a PointPipeline made in Python after 1 updates of DanceGRPOTrainer" in card
    assert "## Before" not in card
