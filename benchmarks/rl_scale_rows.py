"""The runs of `benchmarks.rl_scale`: method, trained weights, distribution over GPUs, settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

RECIPES = {
    ("tiny", "dancegrpo"): "dancegrpo-tiny",
    ("tiny", "diffusion_nft"): "nft-tiny",
    ("wan", "dancegrpo"): "fast-video",
    ("wan", "diffusion_nft"): "nft-video",
}
"""(part, method) -> name of the shipped recipe that the run changes; `wan14` uses those of `wan`."""
TINY_SAMPLES = 256
"""Samples of an update of the part `tiny`, for every number of GPUs."""
PER_GPU = {"wan": 4, "wan14": 2}
"""Samples of an update for each GPU. One GPU has the samples of two GPUs, so that both make the same updates."""
METHODS = ("dancegrpo", "diffusion_nft")
LAUNCHES = {"one": "", "ddp": "ddp", "fully_shard": "ddp", "fsdp2": "fsdp2"}
"""Distribution of the weights -> file of `recipes/accelerate`; an empty name starts no launcher."""
MODELS: dict[str, dict[str, int]] = {
    "wan": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    "wan14": {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40},
}
"""Part -> config of the Wan 2.1 transformer, 1.3B and 14B."""
SIZE = {"height": 480, "width": 832, "num_frames": 33}
WARM = 1
"""Number of first updates that are not measured in the parts `wan` and `wan14`; the part `tiny` leaves out two."""
QUIET: dict[str, Any] = {
    **{"eval_steps": 0, "eval_on_start": False, "eval_reward_funcs": [], "eval_dataset": None, "save_steps": 0},
    **{"save_seconds": 0.0, "logging_steps": 1, "report_to": "none", "disable_tqdm": True},
}
"""Settings of all runs: no evaluations and no checkpoints, and one log line per update."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run: one process or one launch of several processes."""

    part: str
    """`tiny`, `wan` or `wan14`."""
    method: str
    spread: str
    """A key of `LAUNCHES`."""
    gpus: int
    lora: bool = False
    """Whether LoRA adapters are trained; otherwise all weights."""
    samples: int
    """Samples of an update, over all processes."""
    group: int
    """Samples of a prompt."""
    updates: int
    warm: int = WARM
    limit: float
    """Time limit in seconds, with the imports and the building of the model."""
    small: bool = False
    """Whether the run has tiny models and clips, to test the benchmark."""

    @property
    def least(self) -> float:
        """Seconds that a call must have left to start the run."""
        return 0.6 * self.limit

    @property
    def name(self) -> str:
        """Name of the run; it does not depend on the sizes."""
        return "-".join([self.part, self.method, "lora" if self.lora else "full", self.spread, str(self.gpus)])

    @property
    def recipe(self) -> str:
        """Name of the shipped recipe whose settings the run changes."""
        return RECIPES["tiny" if self.part == "tiny" else "wan", self.method]

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)

    def settings(self, device: str) -> dict[str, Any]:
        """Return the settings that replace those of the recipe."""
        most = {"tiny": 4 if self.small else 128, "wan": 2, "wan14": 1}[self.part]
        per_device = min(most, self.samples // self.gpus)
        found: dict[str, Any] = {
            **QUIET,
            **{"device": device, "max_steps": self.updates, "fully_shard": self.spread == "fully_shard"},
            **{"num_generations": self.group, "per_device_train_batch_size": per_device},
            **{"rollout_batch_size": per_device},
            **{"gradient_accumulation_steps": self.samples // (self.gpus * per_device)},
        }
        if self.part == "tiny":
            small = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 4, "bf16": False}
            return found | (small if self.small else {})
        found |= {**SIZE, "reward_funcs": ["benchmarks.rl_scale_worker.brightness"], "use_peft": self.lora}
        if self.method == "dancegrpo":
            # All processes take the same steps, as sharding requires; then no process waits for another window.
            found["sde_window_per"] = "rollout"
        if self.small:
            found |= {"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 16, "lora_r": 2}
        return found


def rows_of(part: str, gpus: Sequence[int], *, small: bool) -> list[Row]:
    """Return the runs of a part, the most important ones first: averaged gradients, then other distributions.

    A run is the same whatever the other numbers of GPUs are. One and two GPUs have the same samples per update; from
    two GPUs on, `wan` and `wan14` have the same samples per GPU, because one GPU would need minutes for the updates of
    eight.

    Args:
        part: `tiny`, `wan`, `wan14`, or `split`: the runs from which the cost of separate GPUs is computed.
        gpus: numbers of GPUs.
        small: return a few runs of tiny models.
    """
    if small:
        return list(_small(part, max(gpus)))
    counts = sorted(set(gpus))
    if part == "tiny":
        common: dict[str, Any] = {"part": "tiny", "group": 16, "updates": 14, "warm": 2, "limit": 90.0}
        return [*_plain(common, METHODS, counts), *_shards(common, METHODS, counts)]
    if part == "wan14":
        common = {"part": part, "group": 2, "updates": 2, "lora": True, "limit": 280.0}
        first, second = METHODS
        plain = _plain(common, [first], counts)
        return [*plain, *_shards(common, [first], counts), *_plain(common, [second], counts)]
    # A prompt of 4 samples for each process; samples of a prompt in one batch share the first steps of a rollout.
    common = {"part": "wan", "group": 4, "updates": 3, "limit": 170.0}
    adapters = {**common, "lora": True}
    lora = _plain(adapters, METHODS, counts)
    if part == "split":
        return lora
    full = [*_plain(common, METHODS, counts), *_shards(common, METHODS, counts)]
    return [*lora, *full, *_shards(adapters, METHODS, counts)]


def samples_of(part: str, count: int) -> int:
    """Return the samples of an update on `count` GPUs."""
    return PER_GPU[part] * max(2, count) if part in PER_GPU else TINY_SAMPLES


def _plain(common: Mapping[str, Any], methods: Sequence[str], counts: Sequence[int]) -> list[Row]:
    return [_row(method, count, common) for method in methods for count in counts]


def _shards(common: Mapping[str, Any], methods: Sequence[str], counts: Sequence[int]) -> list[Row]:
    return [
        _row(method, count, common, spread)
        for method in methods
        for spread in ("fully_shard", "fsdp2")
        for count in counts
        if count > 1
    ]


def _row(method: str, count: int, common: Mapping[str, Any], spread: str = "ddp") -> Row:
    own = {"samples": samples_of(common["part"], count), **common}
    return Row(method=method, gpus=count, spread=spread if count > 1 else "one", **own)


def _small(part: str, most: int) -> Iterator[Row]:
    common: dict[str, Any] = {"samples": 4 * most, "group": 4, "updates": 2, "limit": 60.0, "small": True}
    if part == "tiny":
        yield _row("diffusion_nft", 1, {"part": "tiny", **common, "samples": 4, "warm": 1})
    elif part == "wan14":
        # Frozen bfloat16 and trained float32 weights in one shard.
        yield _row("dancegrpo", most, {"part": part, **common, "lora": True}, "fully_shard")
    else:
        for count in (1, most):
            yield _row("dancegrpo", count, {"part": "wan", **common, "lora": True})
