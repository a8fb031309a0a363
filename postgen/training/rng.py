"""Random states of a process: Python, NumPy, torch on the CPU and on its GPU, and the trainer's generator."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

State = dict[str, Any]
"""JSON values and tensors by name."""


def stream_seed(seed: int, rank: int) -> int:
    """Return the seed of the data stream of process `rank`.

    The result differs from `seed`, which initialises the weights. With equal seeds, the first weights and the first
    batch would use the same random numbers.
    """
    return int(np.random.SeedSequence([seed, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def capture(generator: torch.Generator) -> State:
    """Return all random states of this process, as JSON values and CPU tensors."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    state: State = {
        "python": [version, gauss],
        "python_words": torch.tensor(words, dtype=torch.int64),
        "numpy": [str(name), int(position), int(has_gauss), float(cached)],
        "numpy_keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "torch": torch.get_rng_state(),
        "generator": generator.get_state(),
    }
    if generator.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(generator.device)
    return state


def wrong(state: State) -> str:
    """Return what is wrong with a state from `capture`; an empty text if the state can be restored."""
    try:
        version, gauss = state["python"]
        random.Random().setstate((version, tuple(state["python_words"].tolist()), gauss))
        name, position, has_gauss, cached = state["numpy"]
        keys = state["numpy_keys"].numpy().astype(np.uint32)
        np.random.RandomState().set_state((name, keys, position, has_gauss, cached))
        torch.Generator().set_state(state["torch"])
        if "cuda" not in state:
            torch.Generator().set_state(state["generator"])
        elif any(state[key].dtype != torch.uint8 for key in ("generator", "cuda")):
            return "has random states of a GPU that are not bytes"
    except KeyError as error:
        return f"has no random state {error}"
    except (AttributeError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        return f"has invalid random states: {error}"
    return ""


def restore(state: State, generator: torch.Generator) -> None:
    """Set all random states of this process. States from another kind of device are not applied to this device."""
    version, gauss = state["python"]
    random.setstate((version, tuple(state["python_words"].tolist()), gauss))
    name, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, state["numpy_keys"].numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    on_gpu = generator.device.type == "cuda"
    if on_gpu == ("cuda" in state):
        generator.set_state(state["generator"])
    if on_gpu and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], generator.device)


@contextmanager
def preserved(generator: torch.Generator) -> Iterator[None]:
    """Restore every random state on exit, so that the enclosed code does not change the training that follows."""
    state = capture(generator)
    try:
        yield
    finally:
        restore(state, generator)
