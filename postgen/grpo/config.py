"""Configuration of `DanceGRPOTrainer` and its parts, under TRL's names where the meaning is the same."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from postgen.families.video_calls import RANGES
from postgen.sampling.config import SamplingConfig
from postgen.sampling.transition import NOISE_LEVEL, Kind, Reduction, Weighting
from postgen.settings import Part
from postgen.training import TrainingConfig
from postgen.training.lora import AdapterConfig
from postgen.training.policy import ModelConfig
from postgen.training.prompts import PromptsConfig

from .advantages import Aggregation, Scale

Strategy = Literal["fixed", "progressive", "random"]
WindowPer = Literal["rollout", "prompt", "sample"]


@dataclass(kw_only=True)
class RewardConfig(Part):
    """What samples are scored by.

    Raises:
        UserError: weights that do not fit the rewards.
    """

    part: ClassVar[str] = "reward"
    may_change: ClassVar[tuple[str, ...]] = ("offload_reward", "reward_patience")

    reward_funcs: list[str] = field(default_factory=list)
    """Names of rewards, or functions of your own: `package.module.function`, `file.py:function`."""

    reward_weights: list[float] = field(default_factory=list)
    """A weight for each reward; empty is 1 for all."""

    eval_reward_funcs: list[str] = field(default_factory=list)
    """Rewards that are only ever measured, never trained on: what they lose while the others rise is hacked."""

    reward_device: str | None = None
    """Where rewards with a network compute; none leaves each where it is."""

    offload_reward: bool = False
    """Bring them there only for the call."""

    reward_patience: int = 3
    """Rollouts in a row in which a reward with a weight scores no sample, after which the run stops; 0 is never."""

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = not self.reward_weights or len(self.reward_weights) == len(self.reward_funcs)
        self.require(fits or not self.reward_funcs, "reward_weights", "one number for each of reward_funcs")
        self.require(self.reward_patience >= 0, "reward_patience", "at least 0")


@dataclass(kw_only=True)
class EvaluationConfig(Part):
    """What an evaluation draws and shows, and what follows from reward hacking.

    Raises:
        UserError: a value outside its range.
    """

    part: ClassVar[str] = "eval"
    may_change: ClassVar[tuple[str, ...]] = ("num_generations_eval", "hacking_patience", "on_hacking")

    eval_prompts: int = 64
    """Rows of `eval_dataset` that are evaluated, from the first on."""

    num_generations_eval: int = 1
    """Samples of each of them; with 2 or more their diversity is measured."""

    eval_num_inference_steps: int | None = None
    """Steps of the deterministic sampler in evaluation; none is `num_inference_steps`."""

    eval_guidance_scale: float | None = None
    """Guidance in evaluation; none is `guidance_scale`."""

    eval_grid: int = 9
    """Clips of the fixed-seed grid that each evaluation writes to `samples/`; 0 writes none."""

    hacking_patience: int = 2
    """Evaluations in a row with a rising reward and a falling gold reward that count as reward hacking; 0 never."""

    on_hacking: Literal["flag", "stop"] = "flag"
    """What follows: a warning and the metric `eval_hacking`, or the end of the run as well."""

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
    EvaluationConfig, RewardConfig, SamplingConfig, PromptsConfig, AdapterConfig, ModelConfig, TrainingConfig
):
    """Groups of samples, their rewards and advantages: what every trainer of the family shares.

    Raises:
        UserError: a value outside its range, or groups that do not fit into batches.
    """

    may_change: ClassVar[tuple[str, ...]] = ("log_completions", "num_completions_to_log", "dry_run")
    share_out: ClassVar[tuple[str, ...]] = ("steps_per_generation", "generation_batch_size")

    learning_rate: float = 1e-5
    """Peak learning rate of AdamW. DanceGRPO: 1e-5 for all weights, 3e-4 for LoRA."""

    weight_decay: float = 1e-4
    """AdamW's decoupled decay, on parameters with at least two dimensions only."""

    lr_scheduler_type: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant"
    """Shape of the learning rate over `max_steps`, as in `transformers.get_scheduler`."""

    share_initial_noise: bool = True
    """All samples of a prompt start from one noise. Without it rewards are hacked more easily, says DanceGRPO."""

    num_generations: int = 12
    """Samples of each prompt, at least 2."""

    steps_per_generation: int | None = None
    """Micro-batches that a process trains on per rollout; none is `gradient_accumulation_steps`, one update."""

    generation_batch_size: int | None = None
    """Samples of a rollout over all processes, instead of `steps_per_generation`."""

    num_iterations: int = 1
    """Times that a rollout is trained on."""

    best_of_n: int | None = None
    """Train only on so many samples of each prompt, the best and the worst half; none is all."""

    scale_rewards: Scale = "group"
    """Std that a reward's difference to its group's mean is divided by: of the group, of the batch, or none."""

    multi_objective_aggregation: Aggregation = "sum_of_advantages"
    """How several rewards become one advantage; the other two have TRL's meaning."""

    advantage_clip: float = 5.0
    """Advantages are kept in [-advantage_clip, advantage_clip]."""

    advantage_eps: float = 1e-4
    """Added to the std."""

    log_completions: bool = False
    """Write a table of each logged rollout and some of its clips to `completions/`."""

    num_completions_to_log: int = 4
    """Clips of it."""

    dry_run: bool = False
    """Load the model, print an estimate of memory and cost, then end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.num_completions_to_log >= 0, "num_completions_to_log", "at least 0")
        self.require(self.num_generations >= 2, "num_generations", "at least 2: advantages compare samples")
        self.require(self.num_iterations >= 1, "num_iterations", "at least 1")
        kept = self.best_of_n
        self.require(kept is None or 2 <= kept <= self.num_generations, "best_of_n", "in 2..num_generations")
        for name in ("advantage_clip", "advantage_eps"):
            self.require(getattr(self, name) > 0, name, "above 0")
        both = self.steps_per_generation is not None and self.generation_batch_size is not None
        self.require(not both, "generation_batch_size", "left out when steps_per_generation is given")
        for name in ("steps_per_generation", "generation_batch_size"):
            value = getattr(self, name)
            self.require(value is None or value >= 1, name, "at least 1")

    @property
    def rollout_batch(self) -> int:
        """Samples that a process draws at a time."""
        return self.rollout_batch_size or self.per_device_train_batch_size

    @property
    def kept(self) -> int:
        """Samples of a prompt that are trained on."""
        return self.best_of_n or self.num_generations


@dataclass(kw_only=True)
class DanceGRPOConfig(GroupConfig):
    """Settings of `DanceGRPOTrainer`. The defaults are DanceGRPO's (arXiv:2505.07818, Table 6), but for LoRA.

    Raises:
        UserError: a value outside its range, or values that contradict each other.
    """

    may_change: ClassVar[tuple[str, ...]] = ("check_on_policy_ratio", "max_ratio_error")

    sde_type: Kind = "dance"
    """Transition of the stochastic steps: dance, flow, exact, cps; ddim for models that are no flow."""

    noise_level: float | None = None
    """Strength of the noise; none is the published one of `sde_type`."""

    sde_window_size: int | None = None
    """Stochastic steps in a row; only they are trained. None is all steps but the last."""

    sde_window_range: list[int] = field(default_factory=list)
    """First step, and the one after the last, that the window may cover; empty is the first half, or as many as it
    needs."""

    sde_window_strategy: Strategy = "random"
    """Where the window lies: at the start of the range, moving on every `sde_window_interval` rollouts, or random."""

    sde_window_interval: int = 25
    """Rollouts between two moves of the progressive window, by one step each."""

    sde_window_per: WindowPer = "prompt"
    """What draws its own random window. Advantages compare like with like only if a prompt's samples share it."""

    timestep_fraction: float = 0.6
    """Share of the stochastic steps of a sample that it is trained on, chosen at random."""

    epsilon: float = 1e-4
    """The ratio is clipped at 1 - epsilon."""

    epsilon_high: float | None = None
    """And at 1 + epsilon_high; none is `epsilon`."""

    beta: float = 0.0
    """Weight of the divergence from the reference policy: adapters off, or the weights at the start."""

    kl_type: Literal["mean", "velocity"] = "mean"
    """That divergence: KL of the two transitions per latent value, or mean square of the predictions' difference."""

    ratio_norm: bool = False
    """GRPO-Guard's normalisation of the ratio (arXiv:2510.22319); wants `epsilon` 2e-6 to 4e-6."""

    step_weighting: Weighting = "none"
    """Weights of the steps' losses: none, std, or inv_grad, which lets all steps learn equally."""

    log_prob_reduction: Reduction = "mean"
    """Over the values of a latent. `epsilon` is meant for the mean."""

    check_on_policy_ratio: Literal["warn", "raise", "off"] = "warn"
    """What follows when the ratio of a policy that has not changed yet is not 1."""

    max_ratio_error: float = 1e-5
    """Largest difference of log-probabilities that counts as none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.sde_type != "ode", "sde_type", "a transition with noise: without it nothing is explored")
        self.require(self.noise_level is None or self.noise_level > 0, "noise_level", "above 0")
        self.require(0 < self.timestep_fraction <= 1, "timestep_fraction", "in (0, 1]")
        self.require(0 < self.epsilon < 1, "epsilon", "in (0, 1)")
        self.require(self.epsilon_high is None or self.epsilon_high > 0, "epsilon_high", "above 0")
        self.require(self.beta >= 0, "beta", "at least 0")
        self.require(self.max_ratio_error > 0, "max_ratio_error", "above 0")
        self.require(self.sde_window_interval >= 1, "sde_window_interval", "at least 1")
        last = self.num_inference_steps - 1
        size = self.sde_window_size
        self.require(size is None or 1 <= size <= last, "sde_window_size", f"in 1..{last}: the last step has no noise")
        if self.sde_window_range:
            first, stop = (*self.sde_window_range, -1)[:2]
            fits = len(self.sde_window_range) == 2 and first >= 0 and first + (size or 1) <= stop <= last
            self.require(fits, "sde_window_range", f"[first, stop] that hold the window within 0..{last}")
        if self.ratio_norm:
            self.require(self.sde_type != "cps", "sde_type", "another than cps with ratio_norm, which needs its std")

    @property
    def noise(self) -> float:
        """Strength of the noise."""
        return NOISE_LEVEL[self.sde_type] if self.noise_level is None else self.noise_level

    @property
    def window(self) -> tuple[int, int, int]:
        """(size, first, stop): stochastic steps, and the range that they lie in."""
        last = self.num_inference_steps - 1
        size = self.sde_window_size or (last if not self.sde_window_range else 0)
        if self.sde_window_range:
            first, stop = self.sde_window_range
            return size or stop - first, first, stop
        return size, 0, last if self.sde_window_size is None else min(last, max(size, self.num_inference_steps // 2))
