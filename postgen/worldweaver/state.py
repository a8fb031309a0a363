"""State of a rollout between two shifts. It can be copied, saved to a folder and loaded.

A folder has `state.json` and one file of tensors. `state.json` contains the name and the digest of the tensor file.
A save writes a new tensor file and then replaces `state.json` in one atomic step. A process that is killed at any
moment therefore leaves either the old state or the new state.
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
"""Age of a temporary file in seconds after which no process can still be writing it."""
DECODER = "decoder."
"""Prefix of the entries in `RolloutState.extra` that belong to decoders, for example `decoder.rgb.cache.0`."""
COUNTS = ("autoencoder", "counts", "size")
"""Entries of a decoder that every saved state keeps."""
LATENTS = f"{DECODER}latents"
"""Entry with the last decoded latents. A decoder rebuilds its cache from them if the cache was not saved."""
REACH = f"{DECODER}reach"
"""Entry with the number of latent frames that a decoder needs to rebuild its cache."""
PIECES = f"{DECODER}pieces"
"""Entry with the lengths of the pieces in which the last latents were decoded."""
Prompts = Sequence[tuple[int, Condition]]
"""(start_frame, encoded prompt of B rows), rising: the latent frame from which each prompt applies."""


@dataclass(slots=True)
class Flying:
    """A group in flight: a group that is not yet clean."""

    start_frame: int
    """Index in the video of its first latent frame."""
    age: int
    """Number of segments that the group has completed."""
    z: Tensor
    """(B, M * C, f, h, w) float32 latents."""


@dataclass(slots=True, kw_only=True)
class RolloutState:
    """Everything that a rollout needs to continue.

    The rollout updates the state in each shift. The state can be saved between two groups.
    """

    segments: Segments
    frames: int
    """F, latent frames of a group."""
    sigmas: Tensor
    """(N + 1,) float64 noise levels of the schedule."""
    shape: tuple[int, ...]
    """(M * C, h, w) of a latent frame."""
    bank: MemoryBank
    generators: list[torch.Generator]
    """One generator for each row, for the initial noise."""
    prompts: Prompts
    model: dict[str, Any] = field(default_factory=dict)
    """Description of the model by the caller, JSON values. `load` compares it with the current model."""
    next_frame: int = 0
    """Latent frame at which the next group of noise begins."""
    end: int | None = None
    """Latent frame at which the video ends; None: the video has no end."""
    calls: int = 0
    """Number of forward passes so far."""
    flight: list[Flying] = field(default_factory=list)
    """Groups in flight, oldest first."""
    extra: dict[str, Tensor] = field(default_factory=dict)
    """Further tensors of the caller, for example the disparity range or the cache of a decoder."""

    def __repr__(self) -> str:
        """Return a one-line summary; the tensors would fill pages."""
        end = "no end" if self.end is None else f"{self.end} to come in all"
        done = f"{self.finished} latent frames finished, {len(self.flight)} groups in the making, {end}"
        return f"RolloutState({self.rows} videos, {done})"

    @property
    def rows(self) -> int:
        """B, number of videos."""
        return len(self.generators)

    @property
    def finished(self) -> int:
        """Number of finished latent frames, given frames included; also the start of the next finished group."""
        return self.flight[0].start_frame if self.flight else self.next_frame

    def extend(self, num_latents: int | None) -> None:
        """Make the video longer.

        Groups that are added before the window has drained continue as if the video had no end before. After the
        window has drained it fills again.

        Args:
            num_latents: number of additional latent frames; None: the video has no end.

        Raises:
            UserError: `num_latents` below 1, or a number for a video without end.
        """
        if num_latents is None:
            self.end = None
            return
        check_number("num_latents", num_latents, 1, whole=True)
        if self.end is None:
            raise UserError("a video without end cannot be extended: set state.end to give it an end")
        self.end += num_latents

    def tell(self, prompts: Prompts) -> None:
        """Replace the prompt schedule, from the next shift on.

        Raises:
            UserError: no prompt for the next frame, start frames that do not rise, or a wrong number of rows.
        """
        starts = [start for start, _ in prompts]
        if not starts or starts[0] > self.next_frame:
            begins = f"begins at latent frame {starts[0]}" if starts else "is empty"
            raise UserError(f"the prompt schedule {begins}: give a prompt for frame {self.next_frame}")
        if any(later <= earlier for earlier, later in pairwise(starts)):
            raise UserError(f"the prompt schedule has start frames {starts}: give start frames in rising order")
        for start, condition in prompts:
            for name, value in condition.items():
                if len(value) != self.rows:
                    raise UserError(
                        f"the prompt from frame {start} on has {len(value)} rows of {name!r}: give {self.rows} rows,"
                        " one for each video"
                    )
        self.prompts = list(prompts)

    def branch(self, generators: Sequence[torch.Generator] | None = None) -> RolloutState:
        """Return an independent copy from which the rollout continues.

        Groups in flight stay the same. Without `generators` the copy has the same future as this state.

        Args:
            generators: one generator for each row, for the noise of later groups; None: copies of the current ones.

        Raises:
            UserError: a wrong number of generators.
        """
        twin = RolloutState.from_state_dict(self.state_dict())
        if generators is not None:
            if len(generators) != self.rows:
                raise UserError(f"{len(generators)} generators for {self.rows} videos: give one for each")
            twin.generators = list(generators)
        return twin

    @property
    def decoder_bytes(self) -> int:
        """Size in bytes of the decoder caches that `light` omits; 0: no caches, or caches that cannot be rebuilt."""
        left = [value for name, value in self.extra.items() if _remembered(name)]
        pushed = [int(value[0]) for name, value in self.extra.items() if name.endswith(f".{COUNTS[1]}")]
        if not left or LATENTS not in self.extra or REACH not in self.extra:
            return 0
        known = self.extra[LATENTS].shape[2] >= min(int(self.extra[REACH]), *pushed)
        return sum(value.numel() * value.element_size() for value in left) if known else 0

    def light(self) -> RolloutState:
        """Return the state without the decoder caches, to save disk space. At 480 x 832 nearly all bytes are caches.

        A rollout that resumes from the light state decodes the last latents again to rebuild the caches. The frames
        are those of the full state. The light state shares all other tensors with this state.

        Raises:
            UserError: the caches cannot be rebuilt from the latents in the state.
        """
        left = {name for name in self.extra if _remembered(name)}
        if left and not self.decoder_bytes:
            raise UserError(
                "the decoder of this state cannot rebuild its cache in the middle of a video: save the full state"
            )
        return replace(self, extra={name: value for name, value in self.extra.items() if name not in left})

    def state_dict(self) -> dict[str, Any]:
        """Return a dictionary with `head` (JSON values) and `tensors` (copies, by name)."""
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
        """Return the state that `state_dict` described.

        Args:
            state: from `state_dict`.
            device: of the tensors; None: the device of each tensor in `state`.
        """
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
        """Replace the contents of this state by those that `state_dict` described."""
        other = RolloutState.from_state_dict(state, self.sigmas.device)
        for each in fields(self):
            setattr(self, each.name, getattr(other, each.name))

    def save(self, folder: str | Path) -> None:
        """Write the state to a folder. An existing state is replaced in one atomic step.

        Raises:
            UserError: the memory policy is not registered.
            OSError: the folder cannot be written.
        """
        from safetensors.torch import save

        folder, state = Path(folder), self.state_dict()
        data = save({name: value.to("cpu").contiguous() for name, value in state["tensors"].items()})
        digest = _digest(data)
        # The file name contains the digest, so a save never overwrites the file that the old state.json names.
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
        """Load a state that `save` wrote.

        Args:
            folder: folder of the state.
            model: required description of the model; None: accept any model.
            device: of the tensors.

        Raises:
            UserError: there is no state, or the state is damaged, of another format, or of another model.
        """
        folder = Path(folder)
        while True:
            head = read_json(folder / HEAD, f"{folder} holds no state of a rollout")
            try:
                return cls._loaded(folder, head, model or {}, device)
            except UserError:
                # Another process that continues the video may have replaced the state during the read: try again.
                if read_json(folder / HEAD, f"{folder} holds no state of a rollout") == head:
                    raise

    @classmethod
    def _loaded(cls, folder: Path, head: Any, model: Mapping[str, Any], device: torch.device | str) -> RolloutState:
        head = dict(head) if isinstance(head, dict) else head
        if not isinstance(head, dict) or "format" not in head:
            raise UserError(f"{folder} holds no state of a rollout: {HEAD} has no entry 'format'")
        if head["format"] != FORMAT:
            made = head.get("versions")
            made = (
                ", ".join(f"{name} {value}" for name, value in made.items()) if isinstance(made, dict) else shown(made)
            )
            raise UserError(
                f"the state in {folder} has format {shown(head['format'])} ({made}): this version reads {FORMAT}"
            )
        digest = head.pop("digest", None)
        if digest != _digest(json.dumps(head, sort_keys=True).encode()):
            raise UserError(f"the state in {folder} is damaged: the digest of {HEAD} does not match its contents")
        for name, own in model.items():
            own = json.loads(json.dumps(own))  # JSON turns a tuple into a list
            if (found := head["state"]["model"].get(name)) != own:
                raise UserError(
                    f"the state in {folder} is of a model with {name} {shown(found)}, the current model has"
                    f" {name} {shown(own)}: load the model that the state was made with"
                )
        file = folder / head["file"]
        said = f"the state in {folder} is damaged: {file.name}"
        check_readable(file, said)
        if _digest(file.read_bytes()) != head["tensors"]:
            raise UserError(f"{said} does not match its digest")
        tensors = read_tensors(file, said)
        return cls.from_state_dict({"head": head["state"], "tensors": tensors}, device)


def _remembered(name: str) -> bool:
    """Return whether an entry of `extra` is part of a decoder cache, for example `decoder.rgb.cache.0`."""
    parts = name.split(".", 2)
    return name.startswith(DECODER) and len(parts) == 3 and parts[2] not in COUNTS


def _named(folder: Path) -> Path | None:
    """Return the tensor file that the state in a folder names; None: there is no state, or it is damaged."""
    with suppress(UserError, OSError, TypeError, KeyError):
        name = read_json(folder / HEAD, "")["file"]
        return folder / name if _TENSORS.fullmatch(name) else None
    return None


def _left_behind(folder: Path) -> list[Path]:
    """Return files that killed processes left. Younger files may belong to a process that is still writing."""
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
        raise UserError(f"the state has random number generators on {kind}: resume it on a machine with a CUDA GPU")
    generator = torch.Generator(kind)
    generator.set_state(state.cpu().clone())
    return generator
