"""The settings of fused operations."""

from __future__ import annotations

from dataclasses import dataclass

from postgen.errors import SettingError, UserError, shown

FUSED = ("norm_rope", "adaln", "attention")
"""The operations that `--fused` can name; `FusedOpsConfig` describes each operation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FusedOpsConfig:
    """Which operations of a transformer are fused. All other operations stay those of diffusers."""

    norm_rope: bool = True
    """Norm and rotary embedding of queries and keys in self-attention: `postgen.kernels.qk_norm_rope`."""
    adaln: bool = True
    """Norm with modulation, gate and residual around the layers: `postgen.kernels.adaln`."""
    attention: str | None = "auto"
    """The kernel of self-attention. "auto" uses the fastest installed kernel for each shape, a name of
    `postgen.kernels.attention.ops.backend_names()` uses this kernel, and None leaves self-attention to diffusers. A
    backend that was set with diffusers' `set_attention_backend` has priority."""

    def __post_init__(self) -> None:
        for name in ("norm_rope", "adaln"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"{name} must be True or False, got {shown(getattr(self, name))}")
        self._check_attention()
        if not self.norm_rope and not self.adaln and self.attention is None:
            raise UserError("the settings fuse nothing: set norm_rope=True, adaln=True or attention='auto'")

    @property
    def in_attention(self) -> bool:
        """Return whether any operation inside the attention modules is fused."""
        return self.norm_rope or self.attention is not None

    def _check_attention(self) -> None:
        if self.attention is None or self.attention == "auto":
            return
        from postgen.kernels.attention.ops import backend_names

        if self.attention not in backend_names():
            known = ", ".join(["auto", *backend_names()])
            raise UserError(f"unknown attention backend {shown(self.attention)}. Known: {known}, or None")


def fused_setting(text: str | None) -> FusedOpsConfig | bool:
    """Parse the value of `--fused` or of a sidecar entry.

    Args:
        text: "auto" for all operations, "off" or None for none, or names of `FUSED` separated by commas.

    Raises:
        UserError: the text holds an unknown name.

    >>> fused_setting("norm_rope,adaln").attention is None
    True
    """
    if text in (None, "off"):
        return False
    if text == "auto":
        return FusedOpsConfig()
    names = {name.strip() for name in (text or "").split(",")}
    if not names <= set(FUSED):
        raise SettingError(
            "fused", f" must be auto, off or some of {', '.join(FUSED)} separated by commas, got {shown(text)}"
        )
    attention = "auto" if "attention" in names else None
    return FusedOpsConfig(norm_rope="norm_rope" in names, adaln="adaln" in names, attention=attention)
