"""Fused operations in the blocks of stock diffusers transformers: the same formulas, fewer trips through memory.

Norm and rotation of queries and keys, the norms with modulation, gate and residual around the layers, and attention
run as `postgen.kernels`. No weight changes, state-dict keys stay, and removing them gives the model back bit by bit.
"""

from postgen.fused.apply import FusedOpsHandle, apply_fused_ops, fused_for_call, remove_fused_ops
from postgen.fused.config import FusedOpsConfig
from postgen.fused.known import check_known

__all__ = [
    "FusedOpsConfig",
    "FusedOpsHandle",
    "apply_fused_ops",
    "check_known",
    "fused_for_call",
    "remove_fused_ops",
]
