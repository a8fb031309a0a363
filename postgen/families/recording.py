"""Record inputs and outputs of blocks while a model runs, and run one block alone on its recorded inputs.

    blocks = blocks_of(pipe.transformer)
    recording = capture(pipe.transformer, blocks[:1], lambda: pipe("a ball", num_inference_steps=4))
    for call in recording[blocks[0].name]:
        output = replay(blocks[0], call)

A recording keeps dtype, shape and strides of every tensor, so that a block replayed on the CPU returns the same bits
as in the recorded run. A tensor that several calls share (text, rotary embeddings, the output of one block that is
the input of the next) is stored once, unless torch counted a change in place between the calls. Torch does not count
changes through `.data`, so the recording misses them.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from postgen.errors import UserError
from postgen.families.recording_store import CountingStore, FolderStore, MemoryStore, Store
from postgen.families.registry import blocks_of
from postgen.files import check_place, replacing

if TYPE_CHECKING:
    from postgen.families.blocks import Block


@dataclass(frozen=True, slots=True)
class RecordedCall:
    """One recorded call of one block. Every read returns new tensors, which the caller may change."""

    spec: Mapping[str, Any]
    """Structure of `inputs` and `output`, with the store's keys in place of tensors."""
    store: Store

    def inputs(self, device: torch.device | str = "cpu") -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return positional and keyword arguments of the call, with tensors on the device."""
        loaded = self.store.load(self.spec["inputs"], device)
        args, kwargs = loaded
        return args, kwargs

    def output(self, device: torch.device | str = "cpu") -> Any:
        """Return the output of the block, with tensors on the device."""
        return self.store.load(self.spec["output"], device)


class Recording:
    """Recorded calls by name of the block.

    `recording[name]` is a tuple of `RecordedCall` in the order of the calls. `list(recording)` has the names in the
    order in which the blocks run.
    """

    def __init__(self, specs: Mapping[str, list[dict[str, Any]]], store: Store) -> None:
        self._calls = {name: tuple(RecordedCall(spec, store) for spec in calls) for name, calls in specs.items()}

    @classmethod
    def read(cls, folder: Path | str) -> Recording:
        """Open the recording that `capture` wrote to a folder. Tensors are read on access.

        Raises:
            UserError: the folder has no complete recording.
        """
        store = FolderStore(Path(folder).absolute())
        return cls(store.index(), store)

    def __repr__(self) -> str:
        return f"Recording({', '.join(f'{name}: {len(calls)} calls' for name, calls in self._calls.items())})"

    def __getitem__(self, name: str) -> tuple[RecordedCall, ...]:
        if name not in self._calls:
            raise UserError(f"block {name} was not recorded. Recorded: {', '.join(self._calls)}")
        return self._calls[name]

    def __contains__(self, name: object) -> bool:
        return name in self._calls

    def __iter__(self) -> Iterator[str]:
        return iter(self._calls)

    def __len__(self) -> int:
        return len(self._calls)


def capture(
    transformer: nn.Module,
    blocks: Iterable[Block | str] | str,
    run: Callable[[], Any],
    *,
    where: Literal["cpu"] | Path | str = "cpu",
) -> Recording:
    """Record arguments and output of blocks in every forward pass that `run` makes.

    The recording has the arguments and output as the block's caller sees them, outside the hooks of diffusers and
    accelerate. All hooks are removed at the end, even if `run` fails. Compiled code runs eagerly during the recording,
    because its blocks are not called otherwise. Gradients of `run` work as usual; recorded tensors have none.

    Args:
        transformer: a model with a layout; it may be wrapped (DDP, peft, compiled).
        blocks: blocks from `blocks_of`, or their names. The name of a module inside a block ("blocks.3.attn1") records
            the calls of that module.
        run: function that makes one or several forward passes: a call of the model or of its pipeline.
        where: "cpu" keeps all tensors in memory. A folder (new or empty) receives safetensors files and one JSON file,
            and memory holds only one block's tensors at a time.

    Returns:
        The calls by block, in the order in which the blocks run.

    Raises:
        UserError: the model or a block is unknown, a block did not run, an argument is not a tensor, number, text or
            collection of these, `where` is another device than the CPU, or the folder is not empty or cannot be
            written (full disk).
    """
    chosen = _chosen(transformer, blocks)
    if str(where).partition(":")[0] in ("cuda", "meta", "mps", "xpu"):
        raise UserError(f"where={str(where)!r} cannot keep a recording: give 'cpu' or a folder")
    if where == "cpu":
        memory = MemoryStore()
        return Recording(_recorded(chosen, run, memory), memory)
    # An absolute path stays valid if the run changes the working directory.
    folder = Path(where).absolute()
    if folder == Path.cwd():
        raise UserError(
            "a recording replaces its folder, which is impossible for the working directory: name a new folder"
        )
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder: name a new folder for the recording")
    check_place(folder)
    with replacing(folder) as part:
        store = FolderStore(part)
        store.write_index(_recorded(chosen, run, store))
    return Recording.read(folder)


def recorded_bytes(transformer: nn.Module, blocks: Iterable[Block | str] | str, run: Callable[[], Any]) -> int:
    """Return the bytes of the tensors that `capture` would store for this run, without storing them.

    Arguments and errors are those of `capture`.
    """
    counter = CountingStore()
    _recorded(_chosen(transformer, blocks), run, counter)
    return counter.bytes


def replay(
    block: Block,
    call: RecordedCall,
    *,
    hidden: Tensor | None = None,
    text: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Any:
    """Run one block alone on the inputs of a recorded call, and return its output: on the CPU, the recorded bits.

    Hooks on the block run. Hooks of a cache across denoising steps (`enable_cache`) would return cached outputs:
    remove them first. Enhance-A-Video has no effect here, because it needs a forward pass of the whole model.

    The function sets neither autocast nor gradient mode: call it under the autocast of the recorded run.

    Args:
        block: a block of the recorded model or of a copy of the model, from `blocks_of`.
        call: a call of this block, from a `Recording`.
        hidden: latents in place of the recorded ones.
        text: text in place of the recorded one, if the block takes a text.
        device: device of the inputs; None is that of the block's parameters.

    Raises:
        UserError: a wrapper around the block hides the names of its arguments.
    """
    args, kwargs = call.inputs(_device_of(block.module) if device is None else device)
    args, kwargs = block.fed(args, kwargs, hidden, text)
    return block.module(*args, **kwargs)


def _device_of(module: nn.Module) -> torch.device:
    places = (parameter.device for parameter in module.parameters())
    # Offloaded weights are on the meta device; the hooks that load the weights move the inputs too.
    return next((place for place in places if place.type != "meta"), torch.device("cpu"))


def _chosen(transformer: nn.Module, blocks: Iterable[Block | str] | str) -> dict[str, nn.Module]:
    """Return the chosen modules by name: blocks in the order in which they run, each followed by its inner modules."""
    blocks = [blocks] if isinstance(blocks, str) else blocks
    known = {block.name: block.module for block in blocks_of(transformer)}
    names = {block if isinstance(block, str) else block.name for block in blocks}
    parts = {
        f"{name}.{inner}" if inner else name: part
        for name, module in known.items()
        for inner, part in module.named_modules()
    }
    if unknown := sorted(names - parts.keys()):
        raise UserError(f"no block {', '.join(unknown)} in {type(transformer).__name__}. Known: {', '.join(known)}")
    if not names:
        raise UserError(f"no blocks to record. Known: {', '.join(known)}")
    return {name: part for name, part in parts.items() if name in names}


def _recorded(
    modules: Mapping[str, nn.Module], run: Callable[[], Any], store: Store
) -> dict[str, list[dict[str, Any]]]:
    calls: dict[str, list[dict[str, Any]]] = {name: [] for name in modules}
    begun: dict[str, Any] = {}

    def before(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        begun[name] = store.keep((args, kwargs), f"the arguments of {name}")

    def after(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls[name].append({"inputs": begun.pop(name), "output": store.keep(output, f"the output of {name}")})
        store.flush()

    with ExitStack() as stack:
        stack.enter_context(eagerly())
        for name, module in modules.items():
            # Torch hooks run outermost: the hooks of diffusers and accelerate replace `forward` and run inside.
            hooks = (
                module.register_forward_pre_hook(functools.partial(before, name), prepend=True, with_kwargs=True),
                module.register_forward_hook(functools.partial(after, name)),
            )
            for hook in hooks:
                stack.callback(hook.remove)
        run()
    store.forget()
    if silent := [name for name, found in calls.items() if not found]:
        raise UserError(f"block {', '.join(silent)} did not run: run() must call this model, not another one")
    return calls


@contextmanager
def eagerly() -> Iterator[None]:
    """Run compiled code eagerly in this block, so that hooks on inner modules are called."""
    # If nothing was compiled, `torch._dynamo` is not imported yet: its import is slow and not needed here.
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
