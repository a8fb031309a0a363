"""Configuration of `DanceGRPOTrainer` and its parts. Fields have TRL's names where the meaning is the same."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from postgen.families.video_calls import RANGES
from postgen.sampling.config import SamplingConfig
from postgen.sampling.transition import NOISE_LEVEL, Kind, Reduction, Weighting
from postgen.settings import Part
from postgen.training import TrainingConfig
from postgen.training.memory_config import MemoryConfig
from postgen.training.prompts import PromptsConfig

from .advantage_config import LEAST_GROUP, AdvantageConfig
from .brakes import BrakesConfig

Strategy = Literal["fixed", "progressive", "random"]
WindowPer = Literal["rollout", "prompt", "sample"]
LossPer = Literal["sum", "reward"]


@dataclass(kw_only=True)
class RewardConfig(Part):
    """Rewards that score the samples.

    Raises:
        UserError: the number of weights differs from the number of rewards, or a value is outside its range.
    """

    part: ClassVar[str] = "reward"
    may_change: ClassVar[tuple[str, ...]] = ("offload_reward", "reward_patience")

    reward_funcs: list[str] = field(default_factory=list)
    """Names of rewards, or your own functions: `package.module.function`, `file.py:function`."""

    reward_weights: list[float] = field(default_factory=list)
    """Weight of each reward. An empty list gives every reward weight 1."""

    eval_reward_funcs: list[str] = field(default_factory=list)
    """Held-out ("gold") rewards: evaluation measures them, training never uses them. If they fall while the trained
    rewards rise, the policy exploits the trained rewards (reward hacking)."""

    reward_device: str | None = None
    """Device of the networks of rewards. None: that of the trainer (not mps: the CPU). "cuda": each process's own GPU.
    An option of a reward comes first: `clip_score(device='cpu')`."""

    offload_reward: bool = False
    """Keep the networks of rewards on the CPU, and move each to its device only for the time of a call. This saves
    GPU memory and costs two transfers per rollout."""

    reward_patience: int = 3
    """The run stops when a reward with a non-zero weight scores no sample in this many rollouts in a row; 0 disables
    the check."""

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = not self.reward_weights or len(self.reward_weights) == len(self.reward_funcs)
        self.require(fits or not self.reward_funcs, "reward_weights", "one number for each of reward_funcs")
        self.require(self.reward_patience >= 0, "reward_patience", "at least 0")


@dataclass(kw_only=True)
class EvaluationConfig(Part):
    """Samples and pictures of an evaluation, and the reaction to reward hacking.

    Raises:
        UserError: a value is outside its range.
    """

    part: ClassVar[str] = "eval"
    may_change: ClassVar[tuple[str, ...]] = ("num_generations_eval", "hacking_patience", "on_hacking")

    eval_prompts: int = 64
    """Number of rows of `eval_dataset` to evaluate, starting with the first row."""

    num_generations_eval: int = 1
    """Samples of each evaluated row. With 2 or more, their diversity is measured."""

    eval_num_inference_steps: int | None = None
    """Steps of the deterministic sampler in evaluation. None uses `num_inference_steps`."""

    eval_guidance_scale: float | None = None
    """Guidance scale in evaluation. None uses `guidance_scale`."""

    eval_grid: int = 9
    """Number of clips in the grid that each evaluation writes to `samples/`, with fixed seeds; 0 writes none."""

    eval_motion_exact: bool = False
    """Compare the motion of samples with that of the exact clips of the same scenes. For prompts of the synthetic
    world and square videos."""

    hacking_patience: int = 2
    """Reward hacking is reported when, in this many evaluations in a row, the reward rises and the first reward of
    `eval_reward_funcs` falls; 0 disables the check."""

    on_hacking: Literal["flag", "stop"] = "flag"
    """Reaction to reward hacking: "flag" warns and logs the metric `eval_hacking`; "stop" also ends the run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("eval_prompts", "num_generations_eval"):
            self.require(getattr(self, name) >= 1, name, "at least 1")
        self.require_in((2, RANGES["num_inference_steps"][1]), "eval_num_inference_steps")
        self.require_in(RANGES["guidance_scale"], "eval_guidance_scale")
        for name in ("hacking_patience", "eval_grid"):
            self.require(getattr(self, name) >= 0, name, "at least 0")


@dataclass(kw_only=True)
class GroupConfig(
    BrakesConfig,
    EvaluationConfig,
    AdvantageConfig,
    RewardConfig,
    SamplingConfig,
    PromptsConfig,
    MemoryConfig,
    TrainingConfig,
):
    """Settings that DanceGRPO and DiffusionNFT share: groups of samples, rewards, advantages, batches.

    Raises:
        UserError: a value is outside its range, or two settings exclude each other.
    """

    may_change: ClassVar[tuple[str, ...]] = ("log_completions", "num_completions_to_log", "dry_run")
    share_out: ClassVar[tuple[str, ...]] = ("steps_per_generation", "generation_batch_size")

    learning_rate: float = 1e-5
    """Peak learning rate. DanceGRPO uses 1e-5 for all weights and 3e-4 for LoRA."""

    weight_decay: float = 1e-4
    """Decoupled weight decay. It applies only to parameters with at least two dimensions."""

    lr_scheduler_type: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant"
    """Shape of the learning rate over `max_steps`, as in `transformers.get_scheduler`."""

    share_initial_noise: bool = True
    """All samples of a prompt start from the same noise. According to DanceGRPO, reward hacking is more likely with
    false. With false, the samples of a prompt differ more."""

    num_generations: int = 12
    """Samples drawn for each prompt (the group size), at least 2."""

    steps_per_generation: int | None = None
    """Micro-batches of a process per rollout. None uses `gradient_accumulation_steps`: one update per rollout."""

    generation_batch_size: int | None = None
    """Samples of a rollout over all processes; an alternative to `steps_per_generation`."""

    num_iterations: int = 1
    """Number of passes over each rollout."""

    best_of_n: int | None = None
    """Train on this many samples of each prompt only: half of them the best, half the worst. None trains on all."""

    log_completions: bool = False
    """Write a table of each logged rollout and some of its clips to `completions/`."""

    num_completions_to_log: int = 4
    """Number of clips that `log_completions` writes for each rollout."""

    dry_run: bool = False
    """Load the model, print an estimate of memory and cost, and exit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.num_completions_to_log >= 0, "num_completions_to_log", "at least 0")
        self.require(self.num_generations >= 2, "num_generations", "at least 2: advantages compare samples")
        self.require(self.num_iterations >= 1, "num_iterations", "at least 1")
        kept = self.best_of_n
        self.require(kept is None or 2 <= kept <= self.num_generations, "best_of_n", "in 2..num_generations")
        if self.motion_residual:
            self.require(self.num_frames != 1, "motion_residual", "0 with num_frames: 1: images have no motion")
            least = f"at least {LEAST_GROUP} with motion_residual, which would remove much of the signal by chance"
            self.require(self.num_generations >= LEAST_GROUP, "num_generations", least)
        both = self.steps_per_generation is not None and self.generation_batch_size is not None
        self.require(not both, "generation_batch_size", "left out when steps_per_generation is given")
        for name in ("steps_per_generation", "generation_batch_size"):
            value = getattr(self, name)
            self.require(value is None or value >= 1, name, "at least 1")

    @property
    def evaluates(self) -> bool:
        """Whether a setting asks for evaluations."""
        return super().evaluates or self.eval_motion_exact

    @property
    def rollout_batch(self) -> int:
        """Number of samples that a process draws in one batch."""
        return self.rollout_batch_size or self.per_device_train_batch_size

    @property
    def kept(self) -> int:
        """Number of samples of each prompt that are trained on."""
        return self.best_of_n or self.num_generations

    @property
    def whole_groups(self) -> bool:
        """Whether an update must hold whole groups, because the loss compares the samples of a prompt."""
        return False

    @property
    def reference_guidance(self) -> float:
        """Guidance scale of the reference policy."""
        return self.guidance_scale


@dataclass(kw_only=True)
class DanceGRPOConfig(GroupConfig):
    """Settings of `DanceGRPOTrainer`. The defaults are those of DanceGRPO (arXiv:2505.07818, Table 6), except LoRA.

    Raises:
        UserError: a value is outside its range, or values contradict each other.
    """

    may_change: ClassVar[tuple[str, ...]] = ("check_on_policy_ratio", "max_ratio_error")

    sde_type: Kind = "dance"
    """Transition of the stochastic steps: dance, flow, flow_wan, exact or cps for flow models, ddim for other
    models."""

    noise_level: float | None = None
    """Strength of the noise. None uses the published strength of `sde_type`."""

    sde_window_size: int | None = None
    """Number of consecutive stochastic steps (the window). Only these steps are trained. None: all steps of
    `sde_window_range`, or all but the last step if the range is empty."""

    sde_window_range: list[int] = field(default_factory=list)
    """[first, stop]: the window lies within the steps from `first` to `stop` - 1. Empty: the first half of the steps,
    or the first `sde_window_size` steps if these are more."""

    sde_window_strategy: Strategy = "random"
    """Position of the window: "fixed" at the start of the range, "progressive" (it moves by one step every
    `sde_window_interval` rollouts), or "random"."""

    sde_window_interval: int = 25
    """Rollouts between two moves of the progressive window."""

    sde_window_per: WindowPer = "prompt"
    """Scope of a random window: one for each rollout, each prompt or each sample. Advantages compare samples fairly
    only if the samples of a prompt share a window."""

    timestep_fraction: float = 0.6
    """Share of a sample's stochastic steps that are trained, in (0, 1]. The steps are chosen at random."""

    epsilon: float = 1e-4
    """Lower clip of the probability ratio, at 1 - epsilon."""

    epsilon_high: float | None = None
    """Upper clip of the probability ratio, at 1 + epsilon_high. None uses `epsilon`."""

    loss_per: LossPer = "sum"
    """Number of clipped losses of a step: "sum": one, with the weighted sum of the advantages; "reward": one for each
    reward, added with the weights (DanceGRPO's code for HunyuanVideo). Needs `advantage_clip_per: reward`."""
    policy_loss: Literal["clip", "dppo"] = "clip"
    """Loss of a step: "clip" is PPO's clipped ratio; "dppo" (Flow-DPPO, arXiv:2606.11025) drops the step of a sample
    that has moved far enough from its rollout. "dppo" needs two or more updates per rollout."""

    dppo_delta: float = 1e-5
    """KL divergence per latent value from which `policy_loss: dppo` drops a step."""

    old_log_prob: Literal["rollout", "self", "replay"] = "rollout"
    """Source of the old probability of the ratio: "rollout": the pass that drew the samples; "replay": one more pass
    before the first update, with the batches of training; "self": the training pass itself, so that the ratio is 1,
    for one update per rollout."""

    reuse_graph: Literal["off", "retain", "reweight"] = "off"
    """Train on the forward passes of the rollout, for one update per rollout (LeanGRPO, arXiv:2609.03528): "retain"
    keeps the autograd graphs of the trained steps until the advantages are known; "reweight" keeps one gradient for
    each sample of a process."""

    beta: float = 0.0
    """Weight of the divergence from the reference policy: with new adapters the model without them, otherwise (a
    given `lora_path`, or all weights) a copy of the first weights. DanceGRPO uses 0."""

    kl_type: Literal["mean", "velocity"] = "mean"
    """Divergence that `beta` weights: "mean" is the KL of the two transitions per latent value, "velocity" the mean
    square difference of the two predictions."""

    ratio_norm: bool = False
    """Use GRPO-Guard's normalisation of the ratio (arXiv:2510.22319). It needs `epsilon` of 2e-6 to 4e-6."""

    step_weighting: Weighting = "none"
    """Weight of each step's loss: "none": 1; "std": proportional to the noise of the step; "inv_grad": inverse to the
    gradient of its log-probability by the prediction."""

    log_prob_reduction: Reduction = "mean"
    """Reduction of the log-probability over the values of a latent. The default `epsilon` fits "mean"."""

    check_on_policy_ratio: Literal["warn", "raise", "off"] = "warn"
    """Reaction if the ratio is not 1 before the first update after a rollout, while the policy is unchanged."""

    max_ratio_error: float = 1e-5
    """Largest absolute difference of log-probabilities that `check_on_policy_ratio` accepts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.sde_type != "ode", "sde_type", "one of the others: ode has no noise, so nothing is explored")
        self.require(self.noise_level is None or self.noise_level > 0, "noise_level", "above 0")
        self.require(0 < self.timestep_fraction <= 1, "timestep_fraction", "in (0, 1]")
        self.require(0 < self.epsilon < 1, "epsilon", "in (0, 1)")
        self.require(self.epsilon_high is None or self.epsilon_high > 0, "epsilon_high", "above 0")
        fits = self.loss_per == "sum" or self.advantage_clip_per == "reward"
        self.require(fits, "loss_per", "sum without advantage_clip_per: reward")
        self.require(self.dppo_delta >= 0, "dppo_delta", "at least 0")
        unclipped = self.policy_loss == "dppo"
        fits = not unclipped or self.loss_per == "sum"
        self.require(fits, "loss_per", "sum with policy_loss: dppo, which masks a sample by the sign of its advantage")
        known = self.dppo_delta == type(self).dppo_delta
        self.require(unclipped or known, "dppo_delta", "left out without policy_loss: dppo")
        self.require(not unclipped or self.epsilon_high is None, "epsilon_high", "left out: dppo does not clip ratios")
        self.require(self.beta >= 0, "beta", "at least 0")
        self._check_reuse()
        self.require(self.max_ratio_error > 0, "max_ratio_error", "above 0")
        self.require(self.sde_window_interval >= 1, "sde_window_interval", "at least 1")
        last = self.num_inference_steps - 1
        size = self.sde_window_size
        self.require(size is None or 1 <= size <= last, "sde_window_size", f"in 1..{last}: the last step has no noise")
        if self.sde_window_range:
            first, stop = (*self.sde_window_range, -1)[:2]
            fits = len(self.sde_window_range) == 2 and first >= 0 and first + (size or 1) <= stop <= last
            allowed = f"[first, stop] with 0 <= first < stop <= {last} and room for sde_window_size"
            self.require(fits, "sde_window_range", allowed)
        if self.ratio_norm:
            allowed = "another than cps with ratio_norm: the log-probability of cps is not divided by a variance"
            self.require(self.sde_type != "cps", "sde_type", allowed)

    def _check_reuse(self) -> None:
        reuse = self.reuse_graph
        if reuse == "off":
            return
        left_out = f"left out with reuse_graph {reuse}"
        self.require(self.best_of_n is None, "best_of_n", f"{left_out}, which would pay for dropped samples")
        self.require(self.old_log_prob == "rollout", "old_log_prob", f"rollout with reuse_graph {reuse}")
        if reuse == "reweight":
            one = "1 with reuse_graph reweight, which keeps one gradient per sample"
            self.require(self.rollout_batch == 1, "rollout_batch_size", one)
            for name in ("beta", "norm_guard", "temporal_guard"):
                allowed = "0 with reuse_graph reweight: advantages do not multiply it. reuse_graph retain allows it"
                self.require(not getattr(self, name), name, allowed)

    @property
    def high(self) -> float:
        """Distance of the upper clip from 1: `epsilon_high`, or `epsilon`."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def noise(self) -> float:
        """Strength of the noise: `noise_level`, or the published strength of `sde_type`."""
        return NOISE_LEVEL[self.sde_type] if self.noise_level is None else self.noise_level

    @property
    def keeps_means(self) -> bool:
        """Whether the loss needs the means of the rollout's transitions."""
        known = self.old_log_prob == "self" or self.reuse_graph == "reweight"  # the ratio is 1
        return not known and (self.ratio_norm or self.policy_loss == "dppo")

    @property
    def window(self) -> tuple[int, int, int]:
        """(size, first, stop): the number of stochastic steps, and the range of steps that they lie in."""
        last = self.num_inference_steps - 1
        size = self.sde_window_size or (last if not self.sde_window_range else 0)
        if self.sde_window_range:
            first, stop = self.sde_window_range
            return size or stop - first, first, stop
        return size, 0, last if self.sde_window_size is None else min(last, max(size, self.num_inference_steps // 2))
