"""Block-wise reconstruction: train a replacement (student) for each block of a trained transformer (teacher) to
reproduce the output of the block.

`collect` records calls of the teacher, a `ReconstructTask` describes the student of one block, and `reconstruct`
trains the students. The engine serves linear attention, quantisation and weight sparsity.
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
