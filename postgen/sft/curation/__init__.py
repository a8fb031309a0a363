"""Curation of training clips: filters, duplicates, overlaps with other prompts, and weights against crowding."""

from .bars import Box, find_bars
from .captions import (
    CaptionEmbed,
    Overlap,
    densities,
    density_weights,
    ngram_embeddings,
    overlaps,
    pipeline_embedder,
)
from .config import CurationConfig, read_config
from .cuts import find_cuts, shots, thumbnails
from .filters import FILTERS
from .funnel import Candidate, Funnel, Step, decide
from .hashes import perceptual_hash, thumbnail_embedding
from .measured import Measured, Shot, measure
from .meta import Meta, picked
from .nearest import Duplicates
from .places import Places, check_own
from .report import write_report
from .run import curate
from .store import MeasureStore
from .text_area import text_mask

__all__ = [
    "FILTERS",
    "Box",
    "Candidate",
    "CaptionEmbed",
    "CurationConfig",
    "Duplicates",
    "Funnel",
    "MeasureStore",
    "Measured",
    "Meta",
    "Overlap",
    "Places",
    "Shot",
    "Step",
    "check_own",
    "curate",
    "decide",
    "densities",
    "density_weights",
    "find_bars",
    "find_cuts",
    "measure",
    "ngram_embeddings",
    "overlaps",
    "perceptual_hash",
    "picked",
    "pipeline_embedder",
    "read_config",
    "shots",
    "text_mask",
    "thumbnail_embedding",
    "thumbnails",
    "write_report",
]
