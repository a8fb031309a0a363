"""Settings of the trained model (policy)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from postgen.families.video_calls import RANGES
from postgen.settings import Part


@dataclass(kw_only=True)
class ModelConfig(Part):
    """Settings of the trained model: its source, and how it is loaded and run.

    Raises:
        UserError: a value is outside its range.
    """

    part: ClassVar[str] = "model"
    may_change: ClassVar[tuple[str, ...]] = ("gradient_checkpointing",)

    model: str | None = None
    """A diffusers folder or hub id. None uses the embedded model."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the frozen weights. Trained weights are always float32."""

    flow_shift: float | None = None
    """Shift of the noise levels, above 0. None keeps the scheduler's shift."""

    max_sequence_length: int | None = None
    """Number of tokens of a prompt. None uses the pipeline's default."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.flow_shift is None or self.flow_shift > 0, "flow_shift", "above 0")
        self.require_in(RANGES["max_sequence_length"], "max_sequence_length")
