"""Fused operations in the blocks of stock diffusers transformers: the same formulas with fewer memory accesses.

Three groups of operations run on `postgen.kernels`: norm and rotary embedding of queries and keys, the norms with
modulation, gate and residual around the layers, and self-attention. Weights and state-dict keys do not change, and
removing the plug-in restores the model bit by bit.
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
