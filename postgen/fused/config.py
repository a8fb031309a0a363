"""Which operations are fused."""

from __future__ import annotations

from dataclasses import dataclass

from postgen.errors import UserError, shown

FUSED = ("norm_rope", "adaln", "attention")
"""What `--fused` can name; `FusedOpsConfig` says what they are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FusedOpsConfig:
    """Which operations of a transformer run fused. Everything else stays diffusers' own."""

    norm_rope: bool = True
    """Norm and rotation of queries and keys in self-attention: `postgen.kernels.qk_norm_rope`."""
    adaln: bool = True
    """Norm with modulation, gate and residual around the layers: `postgen.kernels.adaln`."""
    attention: str | None = "auto"
    """Self-attention: auto takes the fastest installed kernel of each shape, a name one of
    `postgen.kernels.attention.ops.backend_names()`, None leaves it to diffusers. A backend that was set on the model
    in diffusers' own way wins."""

    def __post_init__(self) -> None:
        for name in ("norm_rope", "adaln"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"{name} must be True or False, got {shown(getattr(self, name))}")
        self._check_attention()
        if not self.norm_rope and not self.adaln and self.attention is None:
            raise UserError("there is nothing to fuse: set norm_rope, adaln or attention")

    @property
    def in_attention(self) -> bool:
        """Whether anything in the attention modules is fused."""
        return self.norm_rope or self.attention is not None

    def _check_attention(self) -> None:
        if self.attention is None or self.attention == "auto":
            return
        from postgen.kernels.attention.ops import backend_names

        if self.attention not in backend_names():
            known = ", ".join(["auto", *backend_names()])
            raise UserError(f"unknown attention {shown(self.attention)}. Known: {known}, or None")


def fused_setting(text: str | None) -> FusedOpsConfig | bool:
    """Return the setting that a text of the command line or of a sidecar names: auto is all, off and None nothing.

    Raises:
        UserError: an unknown name.

    >>> fused_setting("norm_rope,adaln").attention is None
    True
    """
    if text in (None, "off"):
        return False
    if text == "auto":
        return FusedOpsConfig()
    names = {name.strip() for name in (text or "").split(",")}
    if not names <= set(FUSED):
        raise UserError(
            f"fused must be auto, off or some of {', '.join(FUSED)} with commas between, got {shown(text)}"
        )
    attention = "auto" if "attention" in names else None
    return FusedOpsConfig(norm_rope="norm_rope" in names, adaln="adaln" in names, attention=attention)
