"""The rollout: groups of frames are made and handed out one after the other, for as long as one likes.

Every shift, a new group of noise joins those in flight, the memory is selected once, and S calls of the network take
each group through its segment (`segments`); then the oldest is clean, enters the memory and is handed out. The steps
are those of `postgen.sampling`: `Sampler.walk` with an index for each frame, whose call of the network is replaced by
one with the memory in front. A finished group depends on nothing but the state, which is bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from postgen.errors import UserError, check_number
from postgen.families import Condition, Denoiser
from postgen.interrupts import held
from postgen.sampling.meter import Meter
from postgen.sampling.sampler import Move, Sampler, Sampling
from postgen.sampling.schedule import Schedule
from postgen.sampling.seeds import seed_of

from .levels import FrameLevels, Modality, Role
from .memory import AlphaBar, MemoryBank, MemoryWindow
from .segments import Segments
from .selection import Query
from .state import Flying, Prompts, RolloutState

Poses = Callable[[int, int], Tensor]
"""(start, stop) latent frames -> (B, stop - start, 3, 4) cameras, see `StoredFrame.pose`."""
Extras = Callable[[int, int], Condition]
"""(start, stop) latent frames in flight -> what the network is told beside the prompt, asked once a shift."""


class Predictor(Protocol):
    """A network that takes a window of frames with a noise level of their own in each modality."""

    def predict(self, z: Tensor, levels: FrameLevels, condition: Condition, guidance: float) -> Tensor:
        """Return the prediction, float32 and of the shape of z, also for the memory, where nobody reads it.

        Args:
            z: (B, M * C, T, h, w) float32 latents, modalities one after the other.
            levels: of the T frames; the memory stands in front.
            condition: of the B rows, from `Denoiser.encode_prompt`.
            guidance: scale of classifier-free guidance; up to 1 is none.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A call of the network that has been made."""

    call: int
    """Calls before it, since the rollout began."""
    start_frame: int
    """Latent frame of the video that is the first in flight."""
    index: Tensor
    """(T,) step index of each frame in flight, before the step."""
    latents: Tensor
    """(B, M * C, T, h, w) after it."""
    clean: Tensor
    """The network's estimate of the clean latents."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Finished frames."""

    start_frame: int
    """Number of the first in the video, in latent frames."""
    latents: Tensor
    """(B, M * C, f, h, w) float32, clean; f is F, or less of the last group."""


OnStep = Callable[[Step], Tensor | None]
"""May return other latents to go on with, of the same shape."""
OnGroup = Callable[[Group], Mapping[str, Tensor] | None]
"""May return what `RolloutState.extra` is to be from then on."""


class Rollout:
    """Makes videos group by group.

    Args:
        predictor: the network.
        schedule: noise levels of N steps, of a flow or a model with alpha-bars; the last step should not be empty, as
            with `linspace_schedule`.
        segments: N steps in K segments.
        frames: F, latent frames of a group.
        guidance: scale of classifier-free guidance.
        poses: cameras by latent frame, for the policies that need them.
        extras: further entries of the condition, as what `PlacedMemory.read` returns for the frames in flight. It
            must depend on the frames and on what has been finished alone, so that a resumed run is told the same.
        alpha_bar: `Denoiser.alpha_bar`, for models that are no flow: the noise of memory needs it.
        meter: counts and times calls; None is one of its own.

    Raises:
        UserError: a schedule of another number of steps, no frames, or a model that is no flow without `alpha_bar`.
    """

    def __init__(
        self,
        predictor: Predictor,
        schedule: Schedule,
        segments: Segments,
        *,
        frames: int = 3,
        guidance: float = 1.0,
        poses: Poses | None = None,
        extras: Extras | None = None,
        alpha_bar: AlphaBar | None = None,
        meter: Meter | None = None,
    ) -> None:
        segments.check(schedule)
        check_number("frames", frames, 1, whole=True)
        if (schedule.alpha_bars is None) != (alpha_bar is None):
            raise UserError(f"a model that predicts {schedule.prediction_type}: alpha_bar is for all but flows")
        self.segments, self.frames, self.alpha_bar = segments, frames, alpha_bar
        self.poses, self.extras = poses, extras
        self.schedule = replace(schedule, frame_axis=2)
        self.device = schedule.sigmas.device
        self._steps = _Steps(predictor, self.schedule, guidance, meter or Meter(self.device))

    def start(
        self,
        shape: tuple[int, int, int],
        prompts: Prompts,
        generators: Sequence[torch.Generator],
        bank: MemoryBank,
        *,
        num_latents: int | None = None,
        given: Tensor | None = None,
        unknown: Collection[Modality] = (),
        model: Mapping[str, Any] | None = None,
    ) -> RolloutState:
        """Return the state before the first group.

        Args:
            shape: (M * C, h, w) of a latent frame.
            prompts: (start_frame, encoded prompt) in rising order, latent frames; a prompt is told from the shift on
                in which a group that begins at its frame or later joins, to all groups in flight.
            generators: one for each row, of its initial noise; its seed also seeds the row's noise of memory.
            bank: an empty memory; `MemoryBank(0, 0, 0)` is none at all, and says only how many modalities there are.
            num_latents: new latent frames; None is no end.
            given: (B, M * C, n, h, w) clean latents of an image or video that is the beginning.
            unknown: modalities that `given` does not have.
            model: what the state says of its model, as JSON has it.

        Raises:
            UserError: wrong prompts (`RolloutState.tell`), a bank that is in use or cannot do what it is to do
                (`MemoryBank.check_rows`), no generators, fewer than 1 frame, or given latents that do not fit or that
                no memory would keep.
        """
        if len(bank):
            raise UserError(f"a memory with {len(bank)} frames for a new rollout: reset it, or go on from its state")
        if not generators:
            raise UserError("no generators: give one for each video")
        if shape[0] % bank.modalities:
            raise UserError(f"{shape[0]} channels are not {bank.modalities} modalities of equal size")
        if num_latents is not None:
            check_number("num_latents", num_latents, 1, whole=True)
        chosen_from = unknown if given is not None and given.shape[2] > bank.sink else ()
        bank.check_rows(len(generators), posed=self.poses is not None, unknown=chosen_from)
        begin = self._given(bank, given, (len(generators), *shape), unknown)
        bank.seed([seed_of(generator.initial_seed(), "step") for generator in generators])
        state = RolloutState(
            segments=self.segments,
            frames=self.frames,
            sigmas=self.schedule.sigmas.clone(),
            shape=tuple(shape),
            bank=bank,
            generators=list(generators),
            prompts=(),
            model=dict(model or {}),
            next_frame=begin,
            end=None if num_latents is None else begin + num_latents,
        )
        state.tell(prompts)
        return state

    def groups(
        self, state: RolloutState, *, on_step: OnStep | None = None, on_group: OnGroup | None = None
    ) -> Generator[Group, None, None]:
        """Yield finished groups from a state on, which is changed and between two groups can be saved or branched.

        An exception of the network or of `on_step` leaves the state at the beginning of its shift; after one of
        `on_group` the same group comes again.

        Args:
            state: from `start`, or saved by a rollout with the same segments, levels and group size.
            on_step: called after every call of the network; what it returns takes the place of the latents.
            on_group: called with every finished group, before it enters the memory and is yielded; what it returns
                becomes `state.extra` in the same step.

        Raises:
            UserError: a state of another rollout.
        """
        self._check(state)
        while True:
            if state.flight and state.flight[0].age == self.segments.groups:
                yield self._finish(state, on_group)
            elif self._push(state) or state.flight:
                self._shift(state, on_step)
            else:
                return

    def _finish(self, state: RolloutState, on_group: OnGroup | None) -> Group:
        """Let the oldest group go into the memory."""
        done = state.flight[0]
        group = Group(start_frame=done.start_frame, latents=done.z)
        extra = None if on_group is None else on_group(group)
        poses = self._poses(done.start_frame, done.start_frame + done.z.shape[2])
        with held():  # an interrupt in between would leave the group in both places, or in none
            state.bank.add(done.z, done.start_frame, poses=poses)
            del state.flight[0]
            if extra is not None:
                state.extra = dict(extra)
        return group

    def _push(self, state: RolloutState) -> bool:
        """Let a group of noise join, if there are more to come and the newest has left the first segment."""
        from diffusers.utils.torch_utils import randn_tensor

        left = self.frames if state.end is None else min(self.frames, state.end - state.next_frame)
        if left < 1 or (state.flight and state.flight[-1].age != 1):
            return False
        channels, height, width = state.shape
        shape = (state.rows, channels, left, height, width)
        with held():  # noise that is drawn must not be lost
            noise = randn_tensor(shape, generator=state.generators, device=self.device, dtype=torch.float32)
            state.flight.append(Flying(state.next_frame, 0, noise))
            state.next_frame += left
        return True

    def _shift(self, state: RolloutState, on_step: OnStep | None) -> None:
        """Take every group in flight through its segment."""
        before = [generator.get_state() for generator in state.bank.generators]
        calls = state.calls
        try:
            latents = self._walk(state, on_step)
            parts = latents.split([group.z.shape[2] for group in state.flight], 2)
            # Copies: views would keep the latents of all groups.
            moved = [
                Flying(old.start_frame, old.age + 1, z.clone()) for old, z in zip(state.flight, parts, strict=True)
            ]
            with held():
                state.flight[:] = moved
                state.calls += self.segments.length
        except BaseException:
            if state.calls == calls:
                for generator, kept in zip(state.bank.generators, before, strict=True):
                    generator.set_state(kept)
            raise

    def _walk(self, state: RolloutState, on_step: OnStep | None) -> Tensor:
        first, last = state.flight[0], state.flight[-1]
        poses = self._poses(first.start_frame, state.next_frame)
        query = Query(group=self.frames, poses=poses)
        self._steps.memory = state.bank.select(query, device=self.device, alpha_bar=self.alpha_bar)
        self._steps.modalities = state.bank.modalities
        # A schedule that begins later than what is left in flight is told all the same.
        due = [told for begin, told in state.prompts if begin <= last.start_frame] or [state.prompts[0][1]]
        extras = {} if self.extras is None else self.extras(first.start_frame, state.next_frame)
        condition = {**due[-1], **extras}
        x = torch.cat([group.z for group in state.flight], 2)
        ages = [group.age for group in state.flight for _ in range(group.z.shape[2])]
        index = torch.tensor(ages, device=self.device) * self.segments.length
        for step in range(self.segments.length):
            start = (index + step).expand(state.rows, -1)
            # One move at a time, so that a callback may change the latents.
            for taken in self._steps.walk(
                x, [Move(rows=slice(0, state.rows), start=start, stop=start + 1)], condition
            ):
                x = taken.after
            if on_step is not None:
                clean = taken.transition.clean
                call, at = state.calls + step, first.start_frame
                other = on_step(Step(call=call, start_frame=at, index=start[0], latents=x, clean=clean))
                x = x if other is None else _same(other, x)
        return x

    def _poses(self, start: int, stop: int) -> Tensor | None:
        return None if self.poses is None else self.poses(start, stop)

    def _given(
        self, bank: MemoryBank, given: Tensor | None, shape: tuple[int, ...], unknown: Collection[Modality]
    ) -> int:
        """Store what the video begins with; return how many frames that are."""
        if given is None:
            return 0
        rows, channels, height, width = shape
        if given.dim() != 5 or given[:, :, 0].shape != (rows, channels, height, width):
            raise UserError(
                f"given latents of shape {tuple(given.shape)}: give ({rows}, {channels}, frames, {height}, {width})"
            )
        if not bank.long + bank.short:
            raise UserError("given frames need a memory to be seen in: give a bank with long or short memory")
        frames = given.shape[2]
        bank.add(given, 0, poses=self._poses(0, frames), unknown=unknown)
        return frames

    def _check(self, state: RolloutState) -> None:
        if (state.segments, state.frames) != (self.segments, self.frames):
            had, own = state.segments, self.segments
            raise UserError(
                f"the state is of {had.steps} steps in {had.groups} segments with groups of {state.frames}, this"
                f" rollout of {own.steps} in {own.groups} with {self.frames}: take the same"
            )
        if not torch.equal(state.sigmas.cpu(), self.schedule.sigmas.cpu()):
            raise UserError("the state was made with other noise levels: take the same schedule and shift")


class _Steps(Sampler):
    """`Sampler.walk` over the frames in flight, with the memory in front of them whenever the network is called."""

    memory: MemoryWindow | None = None
    modalities = 1

    def __init__(self, predictor: Predictor, schedule: Schedule, guidance: float, meter: Meter) -> None:
        how = Sampling(kind="ode", guidance=guidance)
        # Deterministic steps ask a denoiser for predictions only, and that below asks the predictor.
        super().__init__(cast(Denoiser, predictor), schedule, how, meter, schedule.sigmas.device)
        self.predictor = predictor

    def predict(self, x: Tensor, start: Tensor, condition: Condition) -> Tensor:
        """Return the prediction for the frames in flight at step indices (B, T)."""
        sigma = self.schedule.sigmas[start].float()[..., None].expand(-1, -1, self.modalities)
        levels = FrameLevels(sigma=sigma, role=torch.full_like(start[0], Role.PREDICT))
        if self.memory is not None:
            x = torch.cat([self.memory.z, x], 2)
            levels = FrameLevels.join([self.memory.levels, levels])
        answer = self.predictor.predict(x, levels, condition, self.how.guidance)
        return answer[:, :, -start.shape[1] :]


def _same(other: Tensor, like: Tensor) -> Tensor:
    if other.shape != like.shape:
        raise UserError(f"on_step returned latents of shape {tuple(other.shape)}: give {tuple(like.shape)}")
    return other.to(like)
