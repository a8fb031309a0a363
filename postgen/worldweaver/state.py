"""Where a rollout stands, between two shifts: kept, copied, written to a folder and read again.

A folder has `state.json` and one file of tensors, which it names with its digest. A save writes a new file of tensors
and then replaces `state.json` in one step, so whoever is killed at any moment leaves the old state or the new one.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from postgen.errors import UserError, check_number, shown
from postgen.families import Condition
from postgen.files import replacing
from postgen.reading import check_readable, read_json
from postgen.tensor_files import read_tensors
from postgen.versions import versions

from .memory import MemoryBank
from .segments import Segments

FORMAT = 1
HEAD = "state.json"
_TENSORS = re.compile(r"state-[0-9a-f]{16}\.safetensors")
_LATER = 3600
"""Seconds after which nobody is still writing a file."""
DECODER = "decoder."
"""Begins the names in `RolloutState.extra` of what decoders remember: `decoder.rgb.cache.0`."""
COUNTS = ("autoencoder", "counts", "size")
"""What of a decoder is always kept."""
LATENTS = f"{DECODER}latents"
"""The last latents that were decoded, for decoders that lost the rest."""
REACH = f"{DECODER}reach"
"""How many of them it takes to remember the same again."""
PIECES = f"{DECODER}pieces"
"""Lengths of the pieces in which they were decoded."""
Prompts = Sequence[tuple[int, Condition]]
"""(start_frame, encoded prompt of B rows), rising: from which latent frame on it is told."""


@dataclass(slots=True)
class Flying:
    """A group in the making."""

    start_frame: int
    """Number of its first latent frame in the video."""
    age: int
    """Segments that it has behind it."""
    z: Tensor
    """(B, M * C, f, h, w) float32 latents."""


@dataclass(slots=True, kw_only=True)
class RolloutState:
    """Everything that a rollout needs to go on. It changes with each shift; between two groups it can be saved."""

    segments: Segments
    frames: int
    """F, latent frames of a group."""
    sigmas: Tensor
    """(N + 1,) float64, the schedule's levels."""
    shape: tuple[int, ...]
    """(M * C, h, w) of a latent frame."""
    bank: MemoryBank
    generators: list[torch.Generator]
    """One for each row: of the initial noise."""
    prompts: Prompts
    model: dict[str, Any] = field(default_factory=dict)
    """What the caller says of its model, as JSON has it; `load` compares it."""
    next_frame: int = 0
    """Latent frame at which the next group begins."""
    end: int | None = None
    """Latent frame at which the video ends; None is never."""
    calls: int = 0
    """Calls of the network so far."""
    flight: list[Flying] = field(default_factory=list)
    """Groups in the making, oldest first."""
    extra: dict[str, Tensor] = field(default_factory=dict)
    """What the caller wants to keep beside it, as the range of disparity or what its decoder remembers."""

    def __repr__(self) -> str:
        """Say where it is; its tensors are pages."""
        end = "no end" if self.end is None else f"{self.end} to come in all"
        done = f"{self.finished} latent frames finished, {len(self.flight)} groups in the making, {end}"
        return f"RolloutState({self.rows} videos, {done})"

    @property
    def rows(self) -> int:
        """B."""
        return len(self.generators)

    @property
    def finished(self) -> int:
        """Latent frames that are finished, those that were given included: where the next group that comes out is."""
        return self.flight[0].start_frame if self.flight else self.next_frame

    def extend(self, num_latents: int | None) -> None:
        """Let the video go on: so many latent frames longer, or without end for None.

        Groups that are pushed before the window has drained go on as if the end had never been there; after that the
        window fills anew.

        Raises:
            UserError: fewer than 1, or a video that has no end.
        """
        if num_latents is None:
            self.end = None
            return
        check_number("num_latents", num_latents, 1, whole=True)
        if self.end is None:
            raise UserError("a video without end cannot be longer: set state.end")
        self.end += num_latents

    def tell(self, prompts: Prompts) -> None:
        """Take another prompt schedule, from the next shift on.

        Raises:
            UserError: no prompt for the next frame, frames that do not rise, or encodings of another number of rows.
        """
        starts = [start for start, _ in prompts]
        if not starts or starts[0] > self.next_frame:
            begins = f"begins at latent frame {starts[0]}" if starts else "is empty"
            raise UserError(f"the prompt schedule {begins}: give a prompt for frame {self.next_frame}")
        if any(later <= earlier for earlier, later in pairwise(starts)):
            raise UserError(f"the prompt schedule has frames {starts}: they must rise")
        for start, condition in prompts:
            for name, value in condition.items():
                if len(value) != self.rows:
                    raise UserError(
                        f"the prompt from frame {start} on has {len(value)} rows of {name!r} for {self.rows} videos"
                    )
        self.prompts = list(prompts)

    def branch(self, generators: Sequence[torch.Generator] | None = None) -> RolloutState:
        """Return a copy that goes on by itself: the same future, or with other generators another one.

        What is in flight stays; new generators make the groups after it.

        Raises:
            UserError: another number of generators than rows.
        """
        twin = RolloutState.from_state_dict(self.state_dict())
        if generators is not None:
            if len(generators) != self.rows:
                raise UserError(f"{len(generators)} generators for {self.rows} videos: give one for each")
            twin.generators = list(generators)
        return twin

    @property
    def decoder_bytes(self) -> int:
        """What `light` leaves out; 0: nothing, or what cannot be made again."""
        left = [value for name, value in self.extra.items() if _remembered(name)]
        pushed = [int(value[0]) for name, value in self.extra.items() if name.endswith(f".{COUNTS[1]}")]
        if not left or LATENTS not in self.extra or REACH not in self.extra:
            return 0
        known = self.extra[LATENTS].shape[2] >= min(int(self.extra[REACH]), *pushed)
        return sum(value.numel() * value.element_size() for value in left) if known else 0

    def light(self) -> RolloutState:
        """Return it without what decoders remember, which at 480 x 832 is nearly all of it: to be saved.

        Whoever goes on decodes the last latents again, as many as what is remembered follows from: the frames are
        those of the whole state. Everything else is shared.

        Raises:
            UserError: what a decoder remembers cannot be made again of the latents that are kept.
        """
        left = {name for name in self.extra if _remembered(name)}
        if left and not self.decoder_bytes:
            raise UserError("the decoder of this state cannot begin in the middle of a video: save the whole state")
        return replace(self, extra={name: value for name, value in self.extra.items() if name not in left})

    def state_dict(self) -> dict[str, Any]:
        """Return `head`, JSON values, and `tensors` by name; tensors are copies."""
        bank = self.bank.state_dict()
        tensors = {"sigmas": self.sigmas}
        tensors |= {f"flight.{n}": group.z for n, group in enumerate(self.flight)}
        tensors |= {f"generators.{n}": each.get_state() for n, each in enumerate(self.generators)}
        for n, (_, told) in enumerate(self.prompts):
            tensors |= {f"prompts.{n}.{name}": value for name, value in told.items()}
        tensors |= {f"bank.{name}": value for name, value in bank.items() if isinstance(value, Tensor)}
        tensors |= {f"extra.{name}": value for name, value in self.extra.items()}
        head = {
            "segments": [self.segments.steps, self.segments.groups],
            "frames": self.frames,
            "shape": list(self.shape),
            "model": self.model,
            "next_frame": self.next_frame,
            "end": self.end,
            "calls": self.calls,
            "flight": [[group.start_frame, group.age] for group in self.flight],
            "prompts": [[start, list(told)] for start, told in self.prompts],
            "generators": [str(each.device) for each in self.generators],
            "bank": {name: value for name, value in bank.items() if not isinstance(value, Tensor)},
            "extra": list(self.extra),
        }
        return {"head": head, "tensors": {name: value.detach().clone() for name, value in tensors.items()}}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], device: torch.device | str | None = None) -> RolloutState:
        """Return the state that `state_dict` described, its tensors on a device, or where they are."""
        head, tensors = state["head"], {name: value.to(device) for name, value in state["tensors"].items()}
        place = head["bank"]["device"]
        bank = MemoryBank(**head["bank"]["settings"], device=device if place not in (None, "cpu") else place)
        own = {name.removeprefix("bank."): value for name, value in tensors.items() if name.startswith("bank.")}
        bank.load_state_dict({**head["bank"], **own})
        steps, groups = head["segments"]
        return cls(
            segments=Segments(steps=steps, groups=groups),
            frames=head["frames"],
            sigmas=tensors["sigmas"].clone(),
            shape=tuple(head["shape"]),
            bank=bank,
            generators=[_generator(kind, tensors[f"generators.{n}"]) for n, kind in enumerate(head["generators"])],
            prompts=[
                (start, {name: tensors[f"prompts.{n}.{name}"].clone() for name in names})
                for n, (start, names) in enumerate(head["prompts"])
            ],
            model=dict(head["model"]),
            next_frame=head["next_frame"],
            end=head["end"],
            calls=head["calls"],
            flight=[
                Flying(start, age, tensors[f"flight.{n}"].clone()) for n, (start, age) in enumerate(head["flight"])
            ],
            extra={name: tensors[f"extra.{name}"].clone() for name in head["extra"]},
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become the state that `state_dict` described."""
        other = RolloutState.from_state_dict(state, self.sigmas.device)
        for each in fields(self):
            setattr(self, each.name, getattr(other, each.name))

    def save(self, folder: str | Path) -> None:
        """Write the state to a folder; a state that is there is replaced in one step.

        Raises:
            UserError: a memory policy that is not registered.
            OSError: the place cannot be written.
        """
        from safetensors.torch import save

        folder, state = Path(folder), self.state_dict()
        data = save({name: value.to("cpu").contiguous() for name, value in state["tensors"].items()})
        digest = _digest(data)
        # Its name follows from what it holds, so that no save touches the file that state.json names now.
        tensors = folder / f"state-{digest[:16]}.safetensors"
        with replacing(tensors) as part:
            part.write_bytes(data)
        head = {
            "format": FORMAT,
            "versions": versions("torch", "diffusers"),
            "file": tensors.name,
            "tensors": digest,
            "state": state["head"],
        }
        head["digest"] = _digest(json.dumps(head, sort_keys=True).encode())
        before = _named(folder)
        try:
            with replacing(folder / HEAD) as part:
                part.write_text(json.dumps(head, indent=1) + "\n", encoding="utf-8")
        except BaseException:
            if _named(folder) != tensors:
                tensors.unlink(missing_ok=True)
            raise
        for old in (before, *_left_behind(folder)):
            if old is not None and old != tensors:
                with suppress(OSError):
                    old.unlink()

    @classmethod
    def load(
        cls, folder: str | Path, *, model: Mapping[str, Any] | None = None, device: torch.device | str = "cpu"
    ) -> RolloutState:
        """Read a state that `save` wrote.

        Args:
            folder: where it is.
            model: what it must say of its model; None takes any.
            device: of its tensors.

        Raises:
            UserError: there is none, it is damaged, of another format, or of another model.
        """
        folder = Path(folder)
        while True:
            head = read_json(folder / HEAD, f"{folder} holds no state of a rollout")
            try:
                return cls._loaded(folder, head, model or {}, device)
            except UserError:
                # Whoever goes on with the video replaces its state: another one may stand there by now.
                if read_json(folder / HEAD, f"{folder} holds no state of a rollout") == head:
                    raise

    @classmethod
    def _loaded(cls, folder: Path, head: Any, model: Mapping[str, Any], device: torch.device | str) -> RolloutState:
        head = dict(head) if isinstance(head, dict) else head
        if not isinstance(head, dict) or "format" not in head:
            raise UserError(f"{folder} holds no state of a rollout: {HEAD} does not say what it is")
        if head["format"] != FORMAT:
            made = head.get("versions")
            made = (
                ", ".join(f"{name} {value}" for name, value in made.items()) if isinstance(made, dict) else shown(made)
            )
            raise UserError(f"{folder} has state format {shown(head['format'])} ({made}): this version reads {FORMAT}")
        digest = head.pop("digest", None)
        if digest != _digest(json.dumps(head, sort_keys=True).encode()):
            raise UserError(f"the state in {folder} is damaged: {HEAD} is not as it was written")
        for name, own in model.items():
            own = json.loads(json.dumps(own))  # a tuple comes back as a list
            if (found := head["state"]["model"].get(name)) != own:
                raise UserError(
                    f"the state in {folder} is of a model with {name} {shown(found)}, this one has {shown(own)}"
                )
        file = folder / head["file"]
        said = f"the state in {folder} is damaged: {file.name}"
        check_readable(file, said)
        if _digest(file.read_bytes()) != head["tensors"]:
            raise UserError(f"{said} is not as it was written")
        tensors = read_tensors(file, said)
        return cls.from_state_dict({"head": head["state"], "tensors": tensors}, device)


def _remembered(name: str) -> bool:
    """Whether an entry of `extra` is what a decoder remembers, and no count: `decoder.rgb.cache.0`."""
    parts = name.split(".", 2)
    return name.startswith(DECODER) and len(parts) == 3 and parts[2] not in COUNTS


def _named(folder: Path) -> Path | None:
    """Return the file of tensors that the state in a folder names; None: there is no state, or a damaged one."""
    with suppress(UserError, OSError, TypeError, KeyError):
        name = read_json(folder / HEAD, "")["file"]
        return folder / name if _TENSORS.fullmatch(name) else None
    return None


def _left_behind(folder: Path) -> list[Path]:
    """Return what processes left that were killed; what is younger may be the work of one that is alive."""
    found = []
    for file in (*folder.glob("state-*.safetensors"), *folder.glob(".state*.part")):
        with suppress(OSError):
            if time.time() - file.stat().st_mtime > _LATER:
                found.append(file)
    return found


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _generator(kind: str, state: Tensor) -> torch.Generator:
    if torch.device(kind).type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"the state has random numbers of {kind}, which is not here: go on where there is a GPU")
    generator = torch.Generator(kind)
    generator.set_state(state.cpu().clone())
    return generator
