"""Quantisation of video DiTs: number formats, calibration, block-wise training, solvers, and quantised linear layers
that diffusers can save and load.

    calibration = Calibration(pipe, prompts)
    report = quantize(pipe.transformer, QuantSpec(weight="int4:g64"), recipe="gptq", calibration=calibration)
    pipe.transformer.save_pretrained("out")  # later: import postgen; WanTransformer3DModel.from_pretrained("out")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .formats import FORMATS, Format, format_of
from .hessian import Hessian, HessianSum
from .linear import QLinear
from .merging import merge_lora_
from .model import quantize_weights
from .report import QuantReport
from .rounding import Quantized, Scales, quantize_tensor
from .solvers import solve
from .spec import LayerSpec, QuantSpec

if TYPE_CHECKING:
    from .calibration import Calibration
    from .calibration_config import CalibrationConfig
    from .recipes import quantize

_LATER = {
    "Calibration": "postgen.quant.calibration",
    "CalibrationConfig": "postgen.quant.calibration_config",
    "quantize": "postgen.quant.recipes",
}
"""Names that are imported when they are first used, because their modules import the trainers, which takes seconds."""

__all__ = [
    "FORMATS",
    "Calibration",
    "CalibrationConfig",
    "Format",
    "Hessian",
    "HessianSum",
    "LayerSpec",
    "QLinear",
    "QuantReport",
    "QuantSpec",
    "Quantized",
    "Scales",
    "format_of",
    "merge_lora_",
    "quantize",
    "quantize_tensor",
    "quantize_weights",
    "solve",
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATER[name]), name)
