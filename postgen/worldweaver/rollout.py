"""The rollout generates a long video group by group. A group is a fixed number of consecutive latent frames.

The rollout repeats one *shift*. At the start of a shift a new group of pure noise joins the groups in flight, and the
memory frames are selected once. Then S forward passes take every group in flight through one segment of noise levels
(`segments`). After the shift the oldest group may be clean: it enters the memory and the rollout yields it.

The sampling steps are those of `postgen.sampling`: `Sampler.walk` with one step index for each frame. The rollout
replaces the forward pass by one with the memory frames in front of the window. A finished group depends only on the
state, and the size of the state is bounded, so a video may have any length.
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
"""Function (start, stop) of latent frames -> (B, stop - start, 3, 4) cameras, in the format of `StoredFrame.pose`."""
Extras = Callable[[int, int], Condition]
"""Function (start, stop) of the latent frames in flight -> further condition entries. Called once a shift."""


class Predictor(Protocol):
    """A network that predicts a window of latent frames, each with its own noise level in each modality."""

    def predict(self, z: Tensor, levels: FrameLevels, condition: Condition, guidance: float) -> Tensor:
        """Return the prediction, float32, of the same shape as z.

        The prediction covers the memory frames too, but the rollout ignores that part.

        Args:
            z: (B, M * C, T, h, w) float32 latents; the channels of the modalities are concatenated.
            levels: noise levels and roles of the T frames; the memory frames come first.
            condition: of the B rows, from `Denoiser.encode_prompt`.
            guidance: scale of classifier-free guidance; a value of 1 or less disables guidance.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One sampling step of all frames in flight, after its forward pass."""

    call: int
    """Number of forward passes since the rollout began, before this one."""
    start_frame: int
    """Index in the video of the first latent frame in flight."""
    index: Tensor
    """(T,) step index of each frame in flight, before the step."""
    latents: Tensor
    """(B, M * C, T, h, w) latents after the step."""
    clean: Tensor
    """The network's estimate of the clean latents."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Finished frames."""

    start_frame: int
    """Index in the video of the first latent frame of the group."""
    latents: Tensor
    """(B, M * C, f, h, w) float32 clean latents. f is F; the last group of a video may be shorter."""


OnStep = Callable[[Step], Tensor | None]
"""Callback after each step. It may return latents of the same shape, with which the rollout continues."""
OnGroup = Callable[[Group], Mapping[str, Tensor] | None]
"""Callback for each finished group. It may return the new value of `RolloutState.extra`."""


class Rollout:
    """Generates videos group by group.

    Args:
        predictor: the network.
        schedule: noise levels of N steps, for a flow model or a model with alpha-bars. The last step should change
            the noise level, as in `linspace_schedule`.
        segments: N steps in K segments.
        frames: F, latent frames of a group.
        guidance: scale of classifier-free guidance.
        poses: returns cameras of latent frames, for memory policies that need cameras.
        extras: returns further entries of the condition for the frames in flight, for example the result of
            `PlacedMemory.read`. The result must depend only on the frame indices and on finished frames, so that a
            resumed rollout gets the same condition.
        alpha_bar: `Denoiser.alpha_bar`, required for models that are not flow models: it scales the noise on memory.
        meter: counts and times forward passes; None: a new meter.

    Raises:
        UserError: a schedule with another number of steps, `frames` below 1, or `alpha_bar` missing or superfluous
            for the prediction type.
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
            raise UserError(
                f"the model predicts {schedule.prediction_type}: give alpha_bar for every model but a flow model"
            )
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
            prompts: (start_frame, encoded prompt), latent frames in rising order. A prompt takes effect at the shift
                in which a group joins that begins at its frame or later; it then applies to all groups in flight.
            generators: one generator for each row, for the initial noise. The seed of a generator also seeds the noise
                on the memory of its row.
            bank: an empty memory bank. `MemoryBank(0, 0, 0)` stores no frames and sets only the number of modalities.
            num_latents: number of new latent frames; None: the video has no end.
            given: (B, M * C, n, h, w) clean latents of an image or video at the beginning of the video.
            unknown: modalities that `given` does not have.
            model: description of the model to keep in the state, JSON values.

        Raises:
            UserError: wrong prompts (see `RolloutState.tell`), a bank that is in use or does not fit the policy
                (see `MemoryBank.check_rows`), no generators, `num_latents` below 1, or given latents of a wrong shape
                or without a memory to store them.
        """
        # Check the arguments before the bank changes.
        if len(bank):
            raise UserError(
                f"the memory bank holds {len(bank)} frames: call reset() on the bank for a new rollout, or resume the"
                " rollout from its state"
            )
        if not generators:
            raise UserError("no generators given: give one generator for each video")
        if shape[0] % bank.modalities:
            raise UserError(
                f"{shape[0]} channels cannot be divided into {bank.modalities} modalities of equal size: give a"
                f" multiple of {bank.modalities} channels"
            )
        if num_latents is not None:
            check_number("num_latents", num_latents, 1, whole=True)
        chosen_from = unknown if given is not None and given.shape[2] > bank.sink else ()
        bank.check_rows(len(generators), posed=self.poses is not None, unknown=chosen_from)
        # Store the given frames, and seed the noise on memory.
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
        """Yield finished groups, beginning at a state, and update the state in place.

        The state can be saved or branched between two groups. If the network or `on_step` raises an exception, the
        state stays at the beginning of the current shift. If `on_group` raises an exception, the rollout passes the
        same group to `on_group` again on the next call.

        Args:
            state: from `start`, or saved by a rollout with the same segments, noise levels and group size.
            on_step: called after every forward pass; latents that it returns replace the current latents.
            on_group: called with every finished group before the group enters the memory and is yielded. The return
                value replaces `state.extra`.

        Raises:
            UserError: a state of a rollout with other settings.
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
        """Move the oldest group from the groups in flight to the memory, and return it."""
        done = state.flight[0]
        group = Group(start_frame=done.start_frame, latents=done.z)
        extra = None if on_group is None else on_group(group)
        poses = self._poses(done.start_frame, done.start_frame + done.z.shape[2])
        with held():  # an interrupt between these statements would leave the group in both places or in neither
            state.bank.add(done.z, done.start_frame, poses=poses)
            del state.flight[0]
            if extra is not None:
                state.extra = dict(extra)
        return group

    def _push(self, state: RolloutState) -> bool:
        """Add a group of noise if the video is not complete and the newest group has left the first segment.

        Returns:
            Whether a group was added.
        """
        from diffusers.utils.torch_utils import randn_tensor

        left = self.frames if state.end is None else min(self.frames, state.end - state.next_frame)
        if left < 1 or (state.flight and state.flight[-1].age != 1):
            return False
        channels, height, width = state.shape
        shape = (state.rows, channels, left, height, width)
        with held():  # the generators have advanced, so the drawn noise must reach the state
            noise = randn_tensor(shape, generator=state.generators, device=self.device, dtype=torch.float32)
            state.flight.append(Flying(state.next_frame, 0, noise))
            state.next_frame += left
        return True

    def _shift(self, state: RolloutState, on_step: OnStep | None) -> None:
        """Take every group in flight through one segment. After an exception the state is as before."""
        before = [generator.get_state() for generator in state.bank.generators]
        calls = state.calls
        try:
            latents = self._walk(state, on_step)
            parts = latents.split([group.z.shape[2] for group in state.flight], 2)
            # Clone: views would keep the latents of all groups in memory.
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
        # Memory and condition stay the same for all steps of the shift.
        first, last = state.flight[0], state.flight[-1]
        poses = self._poses(first.start_frame, state.next_frame)
        query = Query(group=self.frames, poses=poses)
        self._steps.memory = state.bank.select(query, device=self.device, alpha_bar=self.alpha_bar)
        self._steps.modalities = state.bank.modalities
        # The first prompt applies where the schedule begins after the last group in flight.
        due = [told for begin, told in state.prompts if begin <= last.start_frame] or [state.prompts[0][1]]
        extras = {} if self.extras is None else self.extras(first.start_frame, state.next_frame)
        condition = {**due[-1], **extras}
        # Take all groups in flight through their segments together.
        x = torch.cat([group.z for group in state.flight], 2)
        ages = [group.age for group in state.flight for _ in range(group.z.shape[2])]
        index = torch.tensor(ages, device=self.device) * self.segments.length
        for step in range(self.segments.length):
            start = (index + step).expand(state.rows, -1)
            # One step at a time, so that a callback may change the latents between steps.
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
        """Store the given beginning of the video in the bank and return its number of latent frames."""
        if given is None:
            return 0
        rows, channels, height, width = shape
        if given.dim() != 5 or given[:, :, 0].shape != (rows, channels, height, width):
            raise UserError(
                f"given latents have shape {tuple(given.shape)}: give ({rows}, {channels}, frames, {height}, {width})"
            )
        if not bank.long + bank.short:
            raise UserError("given frames need a memory bank: give a bank with long or short memory")
        frames = given.shape[2]
        bank.add(given, 0, poses=self._poses(0, frames), unknown=unknown)
        return frames

    def _check(self, state: RolloutState) -> None:
        if (state.segments, state.frames) != (self.segments, self.frames):
            had, own = state.segments, self.segments
            raise UserError(
                f"the state has {had.steps} steps in {had.groups} segments and groups of {state.frames} frames, this"
                f" rollout has {own.steps} steps in {own.groups} segments and groups of {self.frames} frames: use the"
                " same settings"
            )
        if not torch.equal(state.sigmas.cpu(), self.schedule.sigmas.cpu()):
            raise UserError("the state was made with other noise levels: use the same schedule and the same shift")


class _Steps(Sampler):
    """`Sampler` for the frames that are being denoised (in flight); each forward pass also gets the memory frames.

    Memory frames stand before the frames in flight. Only the prediction for the frames in flight is returned.
    """

    memory: MemoryWindow | None = None
    modalities = 1

    def __init__(self, predictor: Predictor, schedule: Schedule, guidance: float, meter: Meter) -> None:
        how = Sampling(kind="ode", guidance=guidance)
        # Deterministic steps use only predictions of a denoiser, and `predict` below calls the predictor for them.
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
        raise UserError(f"on_step returned latents of shape {tuple(other.shape)}: return shape {tuple(like.shape)}")
    return other.to(like)
