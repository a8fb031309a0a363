"""Block-wise reconstruction: a student for each block of a trained transformer that gives what the block gave.

Of no method: `collect` records a teacher, a `ReconstructTask` says what takes the place of a block, `reconstruct`
trains it. Linear attention, quantisation and weight sparsity are such replacements.
"""

from .collect import collect
from .config import ReconstructConfig, RecordsConfig
from .engine import reconstruct
from .records import Records
from .report import BlockResult, Report, read_report
from .share import Share
from .task import Call, ReconstructTask, block_task

__all__ = [
    "BlockResult",
    "Call",
    "ReconstructConfig",
    "ReconstructTask",
    "Records",
    "RecordsConfig",
    "Report",
    "Share",
    "block_task",
    "collect",
    "read_report",
    "reconstruct",
]
