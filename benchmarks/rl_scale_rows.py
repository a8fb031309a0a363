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
    """Return the runs of a part, the most important ones first.

    All runs of a part have the same number of samples in an update, so the ratio of two times is a speed-up.

    Args:
        part: `tiny`, `wan`, `wan14`, or `split`: the runs from which the cost of separate GPUs is computed.
        gpus: numbers of GPUs.
        small: return a few runs of tiny models.
    """
    if small:
        return list(_small(part, max(gpus)))
    most = max(2, *gpus)
    counts = sorted(gpus)
    if part == "tiny":
        common: dict[str, Any] = {"part": "tiny", "samples": 256, "group": 16, "updates": 14, "warm": 2, "limit": 90.0}
        return [*(_row(method, count, common) for method in METHODS for count in counts), *_shards(common, counts)]
    if part == "wan14":
        common = {"part": part, "samples": 2 * most, "group": 2, "updates": 2, "lora": True, "limit": 280.0}
        plain = [_row("dancegrpo", count, common) for count in counts]
        return plain + [_row("dancegrpo", count, common, "fully_shard") for count in counts if count > 1]
    # A prompt of 4 samples for each process; samples of a prompt in one batch share the first steps of a rollout.
    common = {"part": "wan", "samples": 4 * most, "group": 4, "updates": 3, "limit": 170.0}
    lora = [_row(method, count, {**common, "lora": True}) for method in METHODS for count in counts]
    if part == "split":
        return lora
    full = [_row(method, count, common) for method in METHODS for count in counts]
    return [*lora, *full, *_shards(common, counts)]


def _shards(common: Mapping[str, Any], counts: Sequence[int]) -> list[Row]:
    return [
        _row(method, count, common, spread)
        for method in METHODS
        for spread in ("fully_shard", "fsdp2")
        for count in counts
        if count > 1
    ]


def _row(method: str, count: int, common: Mapping[str, Any], spread: str = "ddp") -> Row:
    return Row(method=method, gpus=count, spread=spread if count > 1 else "one", **common)


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
