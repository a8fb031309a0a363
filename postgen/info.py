"""Report of this machine: package versions, devices and optional parts. Each device and part is tested by using it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.metadata import version
from typing import NamedTuple

import postgen
from postgen.errors import first_line
from postgen.versions import version_of
from postgen.versions import versions as named

PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "safetensors",
    "trl",
    "triton",
    "imageio-ffmpeg",
)


class Finding(NamedTuple):
    """One line of the report."""

    name: str
    """Name of the device, the optional part or the kernel."""
    usable: bool
    """Whether it works here."""
    detail: str
    """Version or path if it works, otherwise the reason why not."""


def versions() -> dict[str, str]:
    """Return the versions of postgen, Python and its main packages; `missing` for a package that is not installed."""
    return named(*PACKAGES)


def devices() -> list[Finding]:
    """Return the devices of torch, and whether a small addition works on each of them."""
    import torch

    threads = torch.get_num_threads()
    findings = [Finding("cpu", True, f"{threads} thread{'s' if threads != 1 else ''}")]
    if not torch.cuda.is_available():
        findings.append(Finding("cuda", False, "torch finds no CUDA GPU"))
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        detail = f"{card.name}, {card.total_memory / 2**30:.0f} GiB, sm{card.major}{card.minor}"
        findings.append(_probed(f"cuda:{index}", partial(_adds, f"cuda:{index}", detail)))
    if torch.backends.mps.is_available():
        findings.append(_probed("mps", lambda: _adds("mps", "Apple GPU")))
    else:
        findings.append(Finding("mps", False, "torch finds no Apple GPU"))
    return findings


def optional_parts() -> list[Finding]:
    """Return the optional parts, and whether each works on this machine."""
    return [_probed(name, probe) for name, probe in _PROBES.items()]


def attention_backends() -> list[Finding]:
    """Return the kernels of `postgen.kernels.attention`, and whether each computes a small attention correctly."""
    import torch

    from postgen.kernels.attention.backends import ASKED_FOR, LAST_RESORTS, TIMED, Call
    from postgen.kernels.attention.router import Router

    place, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    query = torch.ones(1, 8, 2, 128, device=place, dtype=dtype)
    call, router = Call(query, query, query, 128**-0.5, None, False), Router()
    findings = []
    for backend in dict.fromkeys((*TIMED, *LAST_RESORTS, *ASKED_FOR)):
        reason = router.why_not(backend, call)
        findings.append(Finding(backend.name, reason is None, reason or _version_of(backend.packages)))
    return findings


def _version_of(packages: tuple[str, ...]) -> str:
    return ", ".join(f"{name} {found}" for name in packages if (found := version_of(name)))


def _probed(name: str, probe: Callable[[], str]) -> Finding:
    try:
        return Finding(name, True, probe())
    except Exception as error:  # a broken part may raise anything; the report names the error and continues
        return Finding(name, False, _reason(error))


def _reason(error: Exception) -> str:
    """Return why a part does not work; the class of the error only where the message alone would be unclear."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"not installed: there is no module {error.name!r}"
    if type(error) is RuntimeError and str(error).strip():
        return first_line(error)[:120]
    return f"{type(error).__name__}: {first_line(error)[:120]}"


def _adds(place: str, detail: str) -> str:
    import torch

    if float(torch.ones(2, device=place).sum()) != 2:
        raise RuntimeError("the sum of two ones is wrong")
    return detail


def _need_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("installed, but needs a CUDA GPU")


def _embedded() -> str:
    return str(postgen.embedded_model())


def _ffmpeg() -> str:
    import imageio_ffmpeg

    return f"{imageio_ffmpeg.get_ffmpeg_version()} at {imageio_ffmpeg.get_ffmpeg_exe()}"


def _triton() -> str:
    import triton

    _need_cuda()
    return str(triton.__version__)


def _xformers() -> str:
    # An xformers that was built for another torch may import, and fail only when it is used.
    import torch

    attention = import_module("xformers.ops").memory_efficient_attention
    place = "cuda" if torch.cuda.is_available() else "cpu"
    query = torch.ones(1, 8, 1, 16, device=place, dtype=torch.float16 if place == "cuda" else torch.float32)
    try:
        attention(query, query, query)
    except NotImplementedError:
        raise RuntimeError(f"none of its operators runs on {place} with this torch") from None
    return version("xformers")


def _flash_attention() -> str:
    import torch

    attention = import_module("flash_attn").flash_attn_func
    _need_cuda()
    query = torch.ones(1, 8, 1, 64, device="cuda", dtype=torch.float16)
    attention(query, query, query)
    return version("flash-attn")


def _torchvision() -> str:
    import torch

    torchvision = import_module("torchvision")
    torchvision.ops.nms(
        torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.ones(1), 0.5
    )  # fails if the compiled part does not match torch
    return str(torchvision.__version__)


def _imports(module: str, package: str | None = None) -> Callable[[], str]:
    def probe() -> str:
        import_module(module)
        return version(package or module)

    return probe


_PROBES: dict[str, Callable[[], str]] = {
    "embedded model": _embedded,
    "ffmpeg": _ffmpeg,
    "triton": _triton,
    "xformers": _xformers,
    "flash-attn": _flash_attention,
    "torchvision": _torchvision,
    "trl (training recipes)": _imports("trl"),
    "datasets": _imports("datasets"),
    "tensorboard": _imports("tensorboard"),
    "gradio": _imports("gradio"),
}
