"""The trainer with each loss of the forward process: learning, groups, old policies, noise, costs, refusals."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from postgen.errors import UserError
from postgen.families import register_denoiser
from postgen.grpo.nft import DiffusionNFTConfig, DiffusionNFTTrainer
from postgen.sampling.meter import Meter
from tests.grpo.test_learning import run
from tests.grpo.toy import ROWS, grpo, lines, lines_of, near, settings
from tests.sampling.toy import FrameDenoiser, PointPipeline

LOSSES = {
    "nft": {},
    "nft, no weight": {"nft_weight": "none"},
    "awm": {"forward_loss": "awm"},
    "awm uniform, old policy": {"forward_loss": "awm", "awm_weighting": "uniform", "awm_off_policy": True},
    "crd": {"forward_loss": "crd", "crd_kl_guidance": 1.0},
    "dgpo": {"forward_loss": "dgpo"},
    "dpo": {"forward_loss": "dpo", "best_of_n": 2, "per_device_train_batch_size": 4},
}


def forward(folder, **changes):
    return grpo(folder, kind=DiffusionNFTTrainer, **changes)


def weights(folder, step, name="weights"):
    return load_file(folder / f"checkpoint-{step}" / f"{name}.safetensors")


def apart(one, other):
    assert one.keys() == other.keys()
    return max(float((one[key] - other[key]).abs().max()) for key in one)


@pytest.mark.parametrize("name", LOSSES)
def test_it_learns_with_each_loss_but_not_from_shuffled_advantages(tmp_path, name):
    changes = {"max_steps": 40, "beta": 0.0, **LOSSES[name]}
    assert run(tmp_path / "a", kind=DiffusionNFTTrainer, **changes) > 0.3
    with pytest.warns(UserWarning, match="shuffle_advantages"):
        assert run(tmp_path / "b", kind=DiffusionNFTTrainer, shuffle_advantages=True, **changes) < 0.1


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ["awm", "crd", "dgpo"])
def test_it_learns_with_models_that_are_no_flows(tmp_path, name, kind):
    changes = {"max_steps": 30, "beta": 0.0, "prediction_type": kind, **LOSSES[name]}
    assert run(tmp_path, kind=DiffusionNFTTrainer, **changes) > 0.2


GROUPED = {
    "crd": {"forward_loss": "crd", "crd_decay_first": 0.9, "crd_kl_guidance": 1.0, "forward_noise": "group"},
    "dgpo": {"forward_loss": "dgpo", "dgpo_clip": 1e-3},
    "dgpo, old": {"forward_loss": "dgpo", "dgpo_reference": "old", "dgpo_clip": None},
    "dpo": {"forward_loss": "dpo", "num_generations": 2},
}


@pytest.mark.parametrize("name", GROUPED)
def test_groups_that_span_micro_batches_make_the_same_updates(tmp_path, name):
    changes = {"train_timesteps": 2, "max_steps": 3, "beta": 0.1, "old_decay_rate": 0.2, "num_iterations": 2}
    changes = {"num_generations": 4, **changes, **GROUPED[name]}
    if name == "dpo":
        del changes["old_decay_rate"]
    sizes = {
        "one": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 3},
        "cut": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 8},
    }
    for folder, size in sizes.items():
        forward(tmp_path / folder, **size, **changes).train()
    assert apart(weights(tmp_path / "one", 3), weights(tmp_path / "cut", 3)) <= 2e-6
    one, cut = (lines_of(tmp_path / folder)[-1] for folder in sizes)
    for key in ("loss", "kl", *(["group_weight/mean"] if "dgpo" in name else [])):
        assert one[key] == pytest.approx(cut[key], rel=1e-3, abs=1e-6), key


def test_means_are_over_the_samples_of_a_prompt(tmp_path):
    """Not over the micro-batch: other prompts of the micro-batch leave the weight of a group as it is."""
    trainer = forward(tmp_path, forward_loss="dgpo", max_steps=1)
    trainer.train()
    groups, buffer = trainer.groups, trainer.buffer
    groups.open(0, buffer, buffer.advantages)
    rows = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    values = torch.arange(16.0)
    found = groups.mean(values, rows)
    for row, mean in zip(rows.tolist(), found.tolist(), strict=True):
        same = [buffer.prompts[other] == buffer.prompts[row] for other in rows.tolist()]
        assert mean == pytest.approx(values[torch.tensor(same)].mean().item())
    assert groups.centred(torch.arange(16)).view(2, 8).sum(1).abs().max() < 1e-6


@pytest.mark.parametrize("name", LOSSES)
def test_resume_is_exact_with_all_copies(tmp_path, name):
    def train(folder, **changes):
        forward(
            tmp_path / folder, max_steps=5, ema_decay=0.9, steps_per_generation=2, save_steps=1, save_total_limit=None,
            **({} if name == "dpo" else {"old_decay_rate": 0.1}), **LOSSES[name], **changes,
        ).train()  # fmt: skip

    train("straight")
    shutil.copytree(tmp_path / "straight" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    train("resumed", resume_from_checkpoint="latest")
    names = {"weights", "ema", "optimizer"} | ({"copies"} if name != "dpo" else set())
    assert names <= {path.stem for path in (tmp_path / "straight" / "checkpoint-5").glob("*.safetensors")}
    for part in names:
        paths = [tmp_path / run / "checkpoint-5" / f"{part}.safetensors" for run in ("straight", "resumed")]
        assert paths[0].read_bytes() == paths[1].read_bytes(), part
    if name == "crd":
        held = weights(tmp_path / "straight", 5, "copies")
        assert {key.split("|")[0] for key in held} == {"old", "anchor"}


def test_the_old_policy_follows_its_decay_type(tmp_path):
    trainer = forward(tmp_path, old_decay_type=0, max_steps=3)
    trainer.train()
    # Without decay the copy equals the weights before the last update.
    before, held = weights_before(tmp_path / "other"), trainer.old["old"].tensors()
    assert apart(held, before) == 0


def weights_before(folder):
    forward(folder, old_decay_type=0, max_steps=2).train()
    return weights(folder, 2)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [True] * 4),
        ({"forward_loss": "crd", "crd_kl_guidance": 1.0}, [True] * 4),
        ({"forward_loss": "awm"}, [False] * 4),
        ({"forward_loss": "awm", "awm_off_policy": True}, [True] * 4),
        ({"forward_loss": "dgpo", "dgpo_old_after": 1}, [False, False, True, True]),
        ({"forward_loss": "dpo", "best_of_n": 2}, [False] * 4),
    ],
    ids=str,
)
def test_who_draws_the_rollouts(tmp_path, changes, expected):
    found = []

    class Watching(DiffusionNFTTrainer):
        def draw(self, number, samples):
            for copy in self.old.values():
                for value in copy.values:
                    value.fill_(0.5)
            with self.rollout_policy():
                found.append(all(bool((value == 0.5).all()) for value in self.trained().values()))
            return super().draw(number, samples)

    grpo(tmp_path, kind=Watching, max_steps=4, learning_rate=1e-5, **changes).train()
    assert found == expected


@pytest.mark.parametrize(("noise", "equal"), [("auto", False), ("sample", False), ("group", True)])
def test_noise_of_a_group(tmp_path, noise, equal):
    trainer = forward(tmp_path, forward_noise=noise, max_steps=1)
    trainer.train()
    trainer.micro = 0
    noised = trainer._noised(torch.arange(16), 0)
    (a, b), _ = noised.levels.mix()
    drawn = (noised.x - a.float().view(-1, 1, 1, 1, 1) * noised.clean) / b.float().view(-1, 1, 1, 1, 1)
    for low in (0, 8):
        part = drawn[low : low + 8]
        assert bool((part - part[:1]).abs().max() < 1e-5) == equal
        assert (len(set(noised.index[low : low + 8].tolist())) == 1) == equal
    assert (drawn[0] - drawn[8]).abs().max() > 0.1


def test_the_noisiest_levels_only(tmp_path):
    trainer = forward(tmp_path, timestep_fraction=0.3, max_steps=1)
    trainer.train()
    assert {int(trainer._noised(torch.arange(16), number).index.max()) for number in range(5)} == {1}
    assert trainer._noised(torch.arange(16), 0).levels.s.min() > 0.9


def test_advantage_modes_reach_the_loss(tmp_path):
    signs = {}
    for mode in ("all", "binary", "negative_only"):
        trainer = forward(tmp_path / mode, adv_mode=mode, max_steps=1)
        trainer.train()
        signs[mode] = set(trainer._noised(torch.arange(16), 0).advantages.sign().tolist())
    assert signs == {"all": {-1.0, 1.0}, "binary": {-1.0, 1.0}, "negative_only": {-1.0, 0.0}}


def test_awm_clip_and_the_difference_from_the_old_policy(tmp_path):
    """Off policy the ratio leaves 1; awm_ema_beta holds the policy near the old one."""
    changes = {"forward_loss": "awm", "awm_off_policy": True, "old_decay": 0.99, "old_decay_rate": 1.0, "max_steps": 8}
    loose, held = (forward(tmp_path / str(beta), awm_ema_beta=beta, **changes) for beta in (1e-6, 100.0))
    loose.train()
    held.train()
    assert lines(loose)[0]["ratio/mean"] == 1
    assert lines(loose)[-1]["ratio/std"] > 0
    assert lines(held)[-1]["old_difference"] < 0.5 * lines(loose)[-1]["old_difference"]


def test_awm_later_updates_have_the_ratio_to_the_policy_of_the_rollout(tmp_path):
    changes = {"forward_loss": "awm", "steps_per_generation": 2, "num_iterations": 2, "train_timesteps": 2}
    trainer = forward(tmp_path, max_steps=4, **changes)
    trainer.train()
    rows, buffer = lines(trainer), trainer.buffer
    assert rows[0]["ratio/std"] == 0
    assert all(row["ratio/std"] > 0 for row in rows[1:])
    assert buffer.paths.log_probs.shape == (32, 4)
    # The weights before training, which drew the rollout, at the noise of the last update (the fourth).
    first = PointPipeline().transformer
    trainer.policy.denoiser.transformers["transformer"] = first
    trainer.micro = 3
    noised = trainer._noised(torch.arange(16, 32), 1)
    with torch.no_grad():
        prediction = trainer.sampler.predict(noised.x, noised.index, noised.condition)
    expected = trainer._likelihoods(noised, prediction)
    torch.testing.assert_close(buffer.paths.log_probs[16:, 3], expected, rtol=1e-5, atol=1e-7)


def test_crd_holds_good_samples_more_and_guides_the_reference(tmp_path):
    scales = []

    class Guided(DiffusionNFTTrainer):
        def build(self):
            models = super().build()
            predict = self.policy.denoiser.predict

            def seen(x, sigma, condition, guidance=1.0):
                scales.append(guidance)
                assert guidance <= 1 or "negative" in condition
                return predict(x, sigma, condition, guidance)

            self.policy.denoiser.predict = seen
            return models

    grpo(tmp_path, kind=Guided, forward_loss="crd", beta=0.1, max_steps=1).train()
    assert scales.count(4.5) == 1
    assert set(scales) == {1.0, 4.5}


def frames(folder, **changes):
    """Return a trainer of clips of four frames, whose first frames move more the brighter they are."""

    class Frames(PointPipeline):
        pass

    register_denoiser("Frames", FrameDenoiser)
    args = settings(folder, DiffusionNFTConfig, num_frames=4, **{"max_steps": 1, **changes})
    return DiffusionNFTTrainer(Frames(), near, args, ROWS)


def test_dpo_pairs_by_reward_and_by_motion(tmp_path):
    chosen = {}
    for pair_by in ("reward", "motion"):
        trainer = frames(tmp_path / pair_by, forward_loss="dpo", best_of_n=2, pair_by=pair_by)
        trainer.train()
        chosen[pair_by] = trainer.buffer
    reward, motion = chosen["reward"], chosen["motion"]
    assert reward.prompts == motion.prompts
    assert reward.samples != motion.samples
    gaps = {name: (buffer.advantages[0::2] - buffer.advantages[1::2]).abs() for name, buffer in chosen.items()}
    assert bool((gaps["reward"] >= gaps["motion"]).all())
    moves = {
        name: (buffer.paths.clean.diff(dim=2)).abs().mean((1, 2, 3, 4)).view(-1, 2).diff().abs().mean()
        for name, buffer in chosen.items()
    }
    assert moves["motion"] < moves["reward"]


def test_groups_without_spread_have_no_pair(tmp_path):
    trainer = grpo(
        tmp_path, kind=DiffusionNFTTrainer, reward=lambda completions, **columns: [1.0] * len(completions),
        forward_loss="dpo", best_of_n=2, max_steps=2, weight_decay=0.0,
    )  # fmt: skip
    trainer.train()
    assert [row["grad_norm"] for row in lines(trainer)] == [0, 0]
    assert lines(trainer)[0]["frac_reward_zero_std"] == 1


VIDEO: dict[str, dict] = {
    "crd": {"forward_loss": "crd", "beta": 0.1, "precompute_prompt_embeds": True},
    "dgpo": {"forward_loss": "dgpo", "beta": 0.0, "per_device_train_batch_size": 2, "dgpo_old_after": 0},
    "dpo": {"forward_loss": "dpo", "best_of_n": 2, "pair_by": "motion"},
    "awm": {"forward_loss": "awm", "use_peft": False},
}


@pytest.mark.parametrize("name", VIDEO)
def test_it_trains_a_video_model(tiny_wan, tmp_path, name):
    changes = {
        "height": 16, "width": 16, "num_frames": 5, "num_generations": 4, "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4 // VIDEO[name].get("per_device_train_batch_size", 4),
        "num_inference_steps": 3, "max_sequence_length": 16, "lora_r": 2, "use_peft": True, "bf16": True,
        "max_steps": 2, **VIDEO[name],
    }  # fmt: skip
    args = settings(tmp_path, DiffusionNFTConfig, **changes)
    DiffusionNFTTrainer(str(tiny_wan), near, args, [{"prompt": "a ball"}, {"prompt": "a cube"}]).train()
    rows = lines_of(tmp_path)
    assert [row["grad_norm"] > 0 for row in rows] == [True, True]
    first = {"crd": "implicit_reward/abs_mean", "dgpo": "old_difference", "awm": "old_difference"}
    # The policy equals all others before the first update, also in bfloat16.
    assert name not in first or rows[0][first[name]] == 0
    assert rows[0].get("kl", 0) == 0 or name == "crd"  # the reference policy of CRD is guided


COSTS = {
    "nft": ({"beta": 0.1}, 5, 2),
    "awm": ({"forward_loss": "awm", "beta": 0.0}, 4, 1),
    "awm, two updates": ({"forward_loss": "awm", "beta": 0.0, "steps_per_generation": 2}, 4.5, 1),
    "awm, two passes": ({"forward_loss": "awm", "beta": 0.0, "num_iterations": 2, "train_timesteps": 2}, 2 * 4.5, 1),
    "awm without old policy": ({"forward_loss": "awm", "beta": 0.0, "awm_ema_beta": 0.0}, 3, 0),
    "crd": ({"forward_loss": "crd", "beta": 0.1}, 6, 3),
    "crd cut": ({"forward_loss": "crd", "beta": 0.1, "per_device_train_batch_size": 4}, 7, 3),
    "dgpo": ({"forward_loss": "dgpo", "beta": 0.1}, 5, 2),
    "dgpo cut": ({"forward_loss": "dgpo", "beta": 0.1, "per_device_train_batch_size": 4}, 7, 2),
    "dgpo without clip": ({"forward_loss": "dgpo", "beta": 0.0, "dgpo_clip": None}, 4, 2),
    "dgpo, old": ({"forward_loss": "dgpo", "beta": 0.0, "dgpo_reference": "old"}, 4, 1),
    "dpo": ({"forward_loss": "dpo", "best_of_n": 2, "beta": 0.0}, 4, 1),
    "dpo cut": ({"forward_loss": "dpo", "best_of_n": 2, "beta": 0.0, "per_device_train_batch_size": 1}, 5, 1),
    "guided": ({"forward_loss": "dgpo", "guidance_scale": 3.0, "beta": 0.0, "train_timesteps": 2}, 2 * 2 * 5, 2),
}
"""Name -> settings, forward-equivalents of training per sample and noise level times levels, copies of the weights."""


@pytest.mark.parametrize("name", COSTS)
def test_dry_run_and_meter_count_every_pass(tmp_path, name):
    changes, trained, copies = COSTS[name]
    batch = changes.get("per_device_train_batch_size", 16)
    changes = {"gradient_accumulation_steps": 16 // batch, **changes}
    guess = forward(tmp_path / "guess", dry_run=True, **changes).train()
    trainer = forward(tmp_path / "run", **changes)
    trainer.train()
    assert guess.metrics["forward_equivalents/run"] == pytest.approx(trainer.meter.forward_equivalents)
    batches, kept = trainer.batches, 16
    rollout = guess.metrics["passes/rollout_per_sample"] * batches.samples / batches.updates / batches.iterations
    assert guess.metrics["forward_equivalents/update"] == pytest.approx(rollout + kept * trained)
    assert isinstance(trainer.meter, Meter)
    assert guess.metrics["bytes/training"] == (3 + copies) * 4 * guess.metrics["trained_parameters"]


REFUSED = {
    "nft_weight is 'none', it must be left out: only forward_loss nft uses it, not awm": {
        "forward_loss": "awm", "nft_weight": "none",
    },
    "awm_power is 0.5, it must be left out: only forward_loss awm uses it, not nft": {"awm_power": 0.5},
    "pair_by is 'motion', it must be left out: only forward_loss dpo uses it, not dgpo": {
        "forward_loss": "dgpo", "pair_by": "motion",
    },
    "best_of_n is None, it must be 2 with forward_loss dpo, which trains on pairs": {"forward_loss": "dpo"},
    "forward_noise is 'sample', it must be group: dpo compares samples at one noise": {
        "forward_loss": "dpo", "best_of_n": 2, "forward_noise": "sample",
    },
    "adv_mode is 'binary', it must be all: dpo only uses which sample of a pair is better": {
        "forward_loss": "dpo", "best_of_n": 2, "adv_mode": "binary",
    },
    "pair_by is 'motion', it must be reward with num_frames: 1: images have no motion": {
        "forward_loss": "dpo", "best_of_n": 2, "pair_by": "motion",
    },
    "old_decay is 0.3, it must be left out: this form of dpo has no old policy": {
        "forward_loss": "dpo", "best_of_n": 2, "old_decay": 0.3,
    },
    "old_decay is 0.3, it must be left out: old_decay_type 2 sets it": {"old_decay_type": 2, "old_decay": 0.3},
    "old_decay_type is 3, it must be 0, 1 or 2": {"old_decay_type": 3},
    "forward_loss is 'ppo'. Allowed: nft, awm, crd, dgpo, dpo": {"forward_loss": "ppo"},
    "an update trains on 16 samples (per_device_train_batch_size 16 x 1 process x gradient_accumulation_steps 1). Its "
    "loss compares the samples of a prompt, so this must be a multiple of num_generations, which is 12. Set "
    "gradient_accumulation_steps to a multiple of 3": {
        "forward_loss": "crd", "num_generations": 12, "steps_per_generation": 3,
    },
    "init_from with forward_loss dgpo: the reference policy would not have the weights of init_from": {
        "forward_loss": "dgpo", "beta": 0.0, "init_from": "{}",
    },
}  # fmt: skip


@pytest.mark.parametrize("text", REFUSED)
def test_what_cannot_work_is_refused(tmp_path, text):
    changes = dict(REFUSED[text])
    if "init_from" in changes:
        forward(tmp_path / "before", max_steps=1).train()
        changes["init_from"] = str(tmp_path / "before" / "checkpoint-1")
    with pytest.raises(UserError) as caught:
        forward(tmp_path / "run", **changes).train()
    assert str(caught.value).startswith(text)
    assert "\n" not in str(caught.value)


def test_a_guard_needs_a_reference_of_the_same_guidance():
    """The divergence of CRD compares with a guided reference policy, whose predictions have a larger norm."""
    with pytest.raises(UserError, match=r"norm_guard is 0\.1, it must be 0 unless crd_kl_guidance is 1, like guid"):
        DiffusionNFTConfig(output_dir="x", forward_loss="crd", norm_guard=0.1, report_to=[])
    DiffusionNFTConfig(output_dir="x", forward_loss="crd", norm_guard=0.1, crd_kl_guidance=1.0, guidance_scale=1.0)
