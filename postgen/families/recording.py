"""Record what goes in and out of blocks while a model runs, and run one block alone on what was recorded.

    blocks = blocks_of(pipe.transformer)
    recording = capture(pipe.transformer, blocks[:1], lambda: pipe("a ball", num_inference_steps=4))
    for call in recording[blocks[0].name]:
        output = replay(blocks[0], call)

Tensors are kept as the block was given them: type, shape and strides, so that a block replayed on the CPU gives the
bits it gave. A tensor that several calls share (text, rotary embeddings, the output of one block that is the input of
the next) is kept once, as long as torch counts no change of it in place: changes through `.data` go unseen.
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
    """One call of one block. Every reading makes new tensors, so what is read may be changed."""

    spec: Mapping[str, Any]
    """Structure of arguments and output; tensors by their key in the store."""
    store: Store

    def inputs(self, device: torch.device | str = "cpu") -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return positional and keyword arguments, tensors on a device."""
        loaded = self.store.load(self.spec["inputs"], device)
        args, kwargs = loaded
        return args, kwargs

    def output(self, device: torch.device | str = "cpu") -> Any:
        """Return what the block returned, tensors on a device."""
        return self.store.load(self.spec["output"], device)


class Recording:
    """Calls of blocks by the name of the block, each block's in the order in which they were made.

    `recording[name]` is a tuple of `RecordedCall`, `list(recording)` the names in running order.
    """

    def __init__(self, specs: Mapping[str, list[dict[str, Any]]], store: Store) -> None:
        self._calls = {name: tuple(RecordedCall(spec, store) for spec in calls) for name, calls in specs.items()}

    @classmethod
    def read(cls, folder: Path | str) -> Recording:
        """Return what `capture` left in a folder; tensors are read when they are asked for.

        Raises:
            UserError: there is no complete recording in it.
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
    """Record arguments and output of blocks in every forward that `run` makes.

    What a block's caller gives and gets is recorded, whatever hooks of diffusers and accelerate stand between. Nothing
    is left on the model, also when `run` fails. Compiled code runs eagerly meanwhile, since it would not show its
    blocks. Gradients of `run` are left alone; what is kept has none.

    Args:
        transformer: a model that has a layout; DDP, peft and compiled wrappers are looked through.
        blocks: which ones, as `blocks_of` gives them or by name. The name of a module inside a block
            ("blocks.3.attn1") records the calls of that part.
        run: makes the forwards, one or several: a call of the model, or of a pipeline around it.
        where: "cpu" keeps everything in memory; a folder (new or empty) gets safetensors files and one JSON file,
            and no more than one block's tensors are in memory at a time.

    Returns:
        The calls by block, in running order.

    Raises:
        UserError: an unknown model or block, a block that did not run, an argument that is no tensor, number, text or
            collection of these, `where` is another device than the CPU, or a folder that is not empty or cannot
            be written (a full disk).
    """
    chosen = _chosen(transformer, blocks)
    if str(where).partition(":")[0] in ("cuda", "meta", "mps", "xpu"):
        raise UserError(f"where={str(where)!r} is no place to keep a recording: give 'cpu' or a folder")
    if where == "cpu":
        memory = MemoryStore()
        return Recording(_recorded(chosen, run, memory), memory)
    # The run may change the current folder.
    folder = Path(where).absolute()
    if folder == Path.cwd():
        raise UserError(
            "a recording takes the place of its folder, which the current one cannot leave: name a new one"
        )
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} is not an empty folder: name a new one for the recording")
    check_place(folder)
    with replacing(folder) as part:
        store = FolderStore(part)
        store.write_index(_recorded(chosen, run, store))
    return Recording.read(folder)


def recorded_bytes(transformer: nn.Module, blocks: Iterable[Block | str] | str, run: Callable[[], Any]) -> int:
    """Return the bytes of the tensors that `capture` would keep of the same run; nothing is kept.

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
    """Run one block alone on a recorded call, and return what it returns: on the CPU the recorded bits.

    Hooks on the block act. Those of a cache across steps (`enable_cache`) give what they kept: take them off before.
    Enhance-A-Video acts within a forward of the whole model only, so it does not here.

    Autocast and gradients are the caller's: replay under the autocast that the recorded run had.

    Args:
        block: of `blocks_of`, of the recorded model or of a copy of it.
        call: of this block in a `Recording`.
        hidden: latents to take instead of those recorded.
        text: text to take instead of that recorded, where the block takes one.
        device: where to; None is where the block's parameters are.

    Raises:
        UserError: a wrapper around the block hides which argument is which.
    """
    args, kwargs = call.inputs(_device_of(block.module) if device is None else device)
    args, kwargs = block.fed(args, kwargs, hidden, text)
    return block.module(*args, **kwargs)


def _device_of(module: nn.Module) -> torch.device:
    places = (parameter.device for parameter in module.parameters())
    # Offloaded weights are on no device; the hooks that bring them move the inputs too.
    return next((place for place in places if place.type != "meta"), torch.device("cpu"))


def _chosen(transformer: nn.Module, blocks: Iterable[Block | str] | str) -> dict[str, nn.Module]:
    """Return modules by name: blocks in running order, the parts of each after it."""
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
        stack.enter_context(_eagerly())
        for name, module in modules.items():
            # Native hooks, outermost: those of diffusers and accelerate replace `forward` and run inside them.
            hooks = (
                module.register_forward_pre_hook(functools.partial(before, name), prepend=True, with_kwargs=True),
                module.register_forward_hook(functools.partial(after, name)),
            )
            for hook in hooks:
                stack.callback(hook.remove)
        run()
    store.forget()
    if silent := [name for name, found in calls.items() if not found]:
        raise UserError(f"block {', '.join(silent)} did not run: let run() call this very model")
    return calls


@contextmanager
def _eagerly() -> Iterator[None]:
    # Where nothing was compiled, the compiler is not loaded for this.
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
