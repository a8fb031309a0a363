"""Setting the shared-memory carveout through the CUDA driver: when it is set, to which value, and failures."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from postgen.kernels.linear_attention import triton_cache
from postgen.kernels.linear_attention.triton_cache import reserve

KERNEL = SimpleNamespace(function=12345)


class Driver:
    """A stand-in for the CUDA driver that records its calls."""

    def __init__(self) -> None:
        self.opened: list[str] = []
        self.asked: list[tuple[Any, ...]] = []

    def open(self, name: str) -> Any:
        self.opened.append(name)
        return SimpleNamespace(
            cuFuncSetCacheConfig=lambda function, config: self.asked.append((function.value, config)),
            cuFuncSetAttribute=lambda function, which, value: self.asked.append((function.value, which, value)),
        )


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    found = Driver()
    monkeypatch.setattr(ctypes, "CDLL", found.open)
    monkeypatch.setattr(triton_cache, "_reserved", {})
    return found


def test_a_kernel_is_asked_for_once(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for _ in range(3):
        reserve(KERNEL, 30)
    # The first call sets no cache preference, the second CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT.
    assert driver.asked == [(12345, 0), (12345, 9, 30)]
    reserve(SimpleNamespace(function=54321), 30)
    assert len(driver.asked) == 4
    # A different share is set, and then the first share again.
    reserve(KERNEL, 75)
    reserve(KERNEL, 30)
    assert driver.asked[4:] == [(12345, 0), (12345, 9, 75), (12345, 0), (12345, 9, 30)]


@pytest.mark.parametrize("cuda", [None, "13.0"])
def test_nothing_is_touched_without_a_wish_or_a_handle_of_cuda(
    cuda: str | None, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    reserve(None, 30)  # the interpreter returns no kernel
    reserve(SimpleNamespace(function=None), 30)
    reserve(KERNEL, 0)
    if cuda is None:  # torch for ROCm, on a machine that may have CUDA's library too
        reserve(KERNEL, 30)
    assert driver.opened == []


def test_a_driver_that_is_not_there_is_no_error(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        driver.opened.append(name)
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(ctypes, "CDLL", refuse)
    for _ in range(2):
        reserve(KERNEL, 30)
    assert driver.opened == ["libcuda.so.1"]
