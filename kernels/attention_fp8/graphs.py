"""cuDNN's `sdpa_fp8` through NVIDIA's Python front end (`pip install nvidia-cudnn-frontend`), one graph per shape.

The front end builds a graph for given shapes, strides and dtypes. The graph is kept and runs with the pointers of each
call on the current stream; nothing waits for the GPU. The graph also returns the largest exponential and the largest
output, which are not used.
"""

from __future__ import annotations

import functools
import threading
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from postgen.kernels.attention_fp8.naive import SOFTMAX_SCALE, output_scale
from postgen.kernels.dispatch import launching_on
from postgen.kernels.fp8 import E4M3

if TYPE_CHECKING:
    from postgen.kernels.attention.backends import Call

LEAST_CAPABILITY = (9, 0)
"""The smallest compute capability (Hopper) whose tensor cores support cuDNN's kernel for E4M3."""
WIDEST = {9: 256, 10: 128}
"""Major compute capability -> largest number of channels per head; later GPUs have the last entry."""

_MOST_GRAPHS = 256
"""How many graphs are kept; the oldest graph is dropped first."""

# Identifiers of the tensors of a graph.
_QUERY, _KEY, _VALUE, _Q_SCALE, _K_SCALE, _V_SCALE, _S_SCALE, _S_INVERSE, _O_SCALE = range(1, 10)
_OUT, _LSE, _S_LARGEST, _O_LARGEST, _QUERY_LENGTHS, _KEY_LENGTHS = range(10, 16)


class Shape(NamedTuple):
    """The properties of a call for which a graph is built; the tensors are contiguous (B, N, H, D)."""

    device: torch.device
    batch: int
    queries: int
    keys: int
    heads: int
    channels: int
    scale: float
    dtype: torch.dtype
    """The dtype of the output."""
    lengths: bool
    """Whether the call has key lengths."""
    lse: bool
    """Whether the call needs the LSE."""

    @classmethod
    def of(cls, query: Tensor, key: Tensor, scale: float, dtype: torch.dtype, *, lengths: bool, lse: bool) -> Shape:
        """Return the shape of a call."""
        batch, queries, heads, channels = query.shape
        return cls(query.device, batch, queries, key.shape[1], heads, channels, scale, dtype, lengths, lse)


def refusal(device: torch.device, channels: int) -> str | None:
    """Return why a device has no FP8 attention for heads of `channels` channels, or None; it runs no kernel."""
    if device.type != "cuda" or not torch.cuda.is_available() or torch.version.cuda is None:
        return "needs an NVIDIA GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return f"needs compute capability 9.0 (Hopper) or later, this GPU has {capability[0]}.{capability[1]}"
    widest = WIDEST[min(capability[0], max(WIDEST))]
    if channels % 16 or channels > widest:
        return f"supports heads of 16, 32, ... {widest} channels, not of {channels}"
    return missing()


@functools.cache
def missing() -> str | None:
    """Return which package is missing or unsuitable and how to install it, or None."""
    try:
        front_end = import_module("cudnn")
    except (ImportError, OSError) as error:
        # Another package of this name may be installed, or a library that it links may be missing.
        reason = "" if isinstance(error, ModuleNotFoundError) else f" ({str(error).splitlines()[0][:120]})"
        return f"nvidia-cudnn-frontend cannot be imported{reason}: pip install 'postgen[fp8]'"
    if not hasattr(getattr(front_end, "pygraph", None), "sdpa_fp8"):
        return "the installed nvidia-cudnn-frontend has no sdpa_fp8: pip install 'postgen[fp8]'"
    return None


def unrecorded(call: Call) -> str | None:
    """Return why a call cannot run while a CUDA graph is recorded, or None.

    Building a graph of cuDNN waits for the GPU, so it must have been built before the recording.
    """
    if not torch.cuda.is_current_stream_capturing():
        return None
    dtype = _OUTPUTS.get(call.query.device)
    lengths = call.key_lengths is not None
    shape = dtype and Shape.of(call.query, call.key, call.scale, dtype, lengths=lengths, lse=call.lse)
    return None if shape in _GRAPHS else "was not called at this shape before a CUDA graph was recorded"


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scales: tuple[Tensor, Tensor, Tensor],
    *,
    scale: float,
    dtype: torch.dtype,
    key_lengths: Tensor | None = None,
    lse: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute attention of E4M3 tensors with cuDNN.

    Args:
        query: (B, N, H, D), E4M3, contiguous.
        key: (B, M, H, D), E4M3, contiguous.
        value: (B, M, H, D), E4M3, contiguous.
        scales: the scales of query, key and value, one float32 number each, on the GPU. A tensor represents its
            codes times its scale.
        scale: factor of the logits.
        dtype: the dtype of the output, from `output_dtype`: bfloat16 or E4M3.
        key_lengths: (B,), int32, on the GPU: sample b attends to its first `key_lengths[b]` keys only.
        lse: whether to return the LSE too.

    Returns:
        The output (B, N, H, D), the float32 number by which it must be multiplied, and the LSE (B, H, N) in float32
        or None.

    Raises:
        Exception: the front end cannot build this graph; the type differs between its versions.
    """
    shape = Shape.of(query, key, scale, dtype, lengths=key_lengths is not None, lse=lse)
    with launching_on(query):
        graph, workspace_bytes = _built(shape)
        limit = output_scale(scales[2], shape.keys) if dtype == E4M3 else torch.ones_like(scales[2])
        tensors = _tensors(shape, query, key, value, scales, 1 / limit, key_lengths)
        # From torch's allocator, which handles streams and CUDA graphs and reuses the memory.
        workspace = torch.empty(workspace_bytes, dtype=torch.uint8, device=query.device)
        handles = _handles()
        with handles.lock:
            graph.execute(tensors, workspace, handle=handles.on_current_stream(query.device))
    found = tensors.get(_LSE)
    return tensors[_OUT], limit, None if found is None else found.view(found.shape[:3])


def _tensors(
    shape: Shape,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scales: tuple[Tensor, Tensor, Tensor],
    of_output: Tensor,
    key_lengths: Tensor | None,
) -> dict[int, Tensor]:
    """Return the input and output tensors of a call by their identifiers in the graph."""
    one = scales[0].new_ones(())
    tensors = {
        _QUERY: query,
        _KEY: key,
        _VALUE: value,
        _Q_SCALE: scales[0],
        _K_SCALE: scales[1],
        _V_SCALE: scales[2],
        _S_SCALE: one * SOFTMAX_SCALE,
        _S_INVERSE: one / SOFTMAX_SCALE,
        _O_SCALE: of_output,
        _OUT: torch.empty(query.shape, dtype=shape.dtype, device=query.device),
        _S_LARGEST: torch.empty_like(one),
        _O_LARGEST: torch.empty_like(one),
    }
    if shape.lse:
        tensors[_LSE] = one.new_empty(shape.batch, shape.heads, shape.queries, 1)
    if key_lengths is not None:
        tensors[_KEY_LENGTHS] = key_lengths.contiguous()
        tensors[_QUERY_LENGTHS] = torch.full_like(tensors[_KEY_LENGTHS], shape.queries)
    return tensors


_GRAPHS: dict[Shape, tuple[Any, int]] = {}
"""Shape -> (the built graph, the bytes of its workspace), for this process."""


def _built(shape: Shape) -> tuple[Any, int]:
    # Building uses the handle too, and another thread may be building the same graph.
    with _handles().lock:
        return _GRAPHS[shape] if shape in _GRAPHS else _build(shape)


def _build(shape: Shape) -> tuple[Any, int]:
    graph = _graph(shape)
    front_end = import_module("cudnn")
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([front_end.heur_mode.A, front_end.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    if len(_GRAPHS) >= _MOST_GRAPHS:
        del _GRAPHS[next(iter(_GRAPHS))]
    # The front end needs a pointer even for an empty workspace.
    _GRAPHS[shape] = graph, max(1, graph.get_workspace_size())
    return _GRAPHS[shape]


def _graph(shape: Shape) -> Any:
    front_end = import_module("cudnn")
    kinds = front_end.data_type
    graph = front_end.pygraph(
        io_data_type=kinds.FP8_E4M3, intermediate_data_type=kinds.FLOAT, compute_data_type=kinds.FLOAT,
        handle=_handles().on_current_stream(shape.device),
    )  # fmt: skip

    def rows(number: int, tokens: int) -> Any:
        dim, stride = _layout(shape, tokens)
        return graph.tensor(uid=number, dim=dim, stride=stride, data_type=kinds.FP8_E4M3)

    def number(uid: int) -> Any:
        return graph.tensor(uid=uid, dim=(1, 1, 1, 1), stride=(1, 1, 1, 1), data_type=kinds.FLOAT)

    def lengths(uid: int) -> Any:
        return graph.tensor(uid=uid, dim=(shape.batch, 1, 1, 1), stride=(1, 1, 1, 1), data_type=kinds.INT32)

    # Key lengths are a padding mask.
    padding = {}
    if shape.lengths:
        seq_lens = {"seq_len_q": lengths(_QUERY_LENGTHS), "seq_len_kv": lengths(_KEY_LENGTHS)}
        padding = {"use_padding_mask": True, **seq_lens}
    out, stats, s_largest, o_largest = graph.sdpa_fp8(
        q=rows(_QUERY, shape.queries), k=rows(_KEY, shape.keys), v=rows(_VALUE, shape.keys),
        descale_q=number(_Q_SCALE), descale_k=number(_K_SCALE), descale_v=number(_V_SCALE),
        descale_s=number(_S_INVERSE), scale_s=number(_S_SCALE), scale_o=number(_O_SCALE),
        generate_stats=shape.lse, attn_scale=shape.scale, **padding,
    )  # fmt: skip
    # Describe the outputs: attention, the largest exponential and output, and the LSE.
    dim, stride = _layout(shape, shape.queries)
    kind = kinds.FP8_E4M3 if shape.dtype == E4M3 else kinds.BFLOAT16
    out.set_uid(_OUT).set_output(True).set_dim(dim).set_stride(stride).set_data_type(kind)
    for uid, each in ((_S_LARGEST, s_largest), (_O_LARGEST, o_largest)):
        each.set_uid(uid).set_output(True).set_dim((1, 1, 1, 1)).set_stride((1, 1, 1, 1)).set_data_type(kinds.FLOAT)
    if shape.lse:
        dim = (shape.batch, shape.heads, shape.queries, 1)
        stride = (shape.heads * shape.queries, shape.queries, 1, 1)
        stats.set_uid(_LSE).set_output(True).set_dim(dim).set_stride(stride).set_data_type(kinds.FLOAT)
    return graph


def _layout(shape: Shape, tokens: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return sizes and strides in the order of the front end, (B, H, N, D), for memory in the order (B, N, H, D)."""
    row = shape.heads * shape.channels
    return (shape.batch, shape.heads, tokens, shape.channels), (tokens * row, shape.channels, row, 1)


_OUTPUTS: dict[torch.device, torch.dtype] = {}


def output_dtype(device: torch.device) -> torch.dtype:
    """Return the output dtype of cuDNN for E4M3 inputs: bfloat16 where cuDNN supports it, else E4M3.

    The first call for a device tries to build a graph with bfloat16 output. Front ends up to 1.32 refuse that below
    compute capability 10.0.
    """
    if device not in _OUTPUTS:
        shape = Shape(device, 1, 128, 128, 1, 128, 0.1, torch.bfloat16, lengths=False, lse=False)
        try:
            with torch.cuda.device(device):
                _built(shape)
            _OUTPUTS[device] = torch.bfloat16
        except Exception:  # the type of the error differs between versions of the front end
            _OUTPUTS[device] = E4M3
    return _OUTPUTS[device]


class _Handles:
    """The cuDNN handles, one per device. A handle has one stream, so threads use it in turns, under `lock`."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._of_device: dict[torch.device, int] = {}

    def on_current_stream(self, device: torch.device) -> int:
        """Return the handle of a device, set to the current stream of this device."""
        front_end = import_module("cudnn")
        if device not in self._of_device:
            self._of_device[device] = front_end.create_handle()
        handle = self._of_device[device]
        front_end.set_stream(handle=handle, stream=torch.cuda.current_stream(device).cuda_stream)
        return handle


@functools.cache
def _handles() -> _Handles:
    return _Handles()
