"""Calibration: measure the error of FP8 attention in each layer and step of a user's model before applying it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from postgen.errors import UserError, did_you_mean, is_number, is_whole, shown
from postgen.families import video_tokens_of
from postgen.families.attention.dispatch import divert_dispatched, install_attention_tap
from postgen.families.installed import processor_stack, transformers_of
from postgen.families.progress import PipelineProgress
from postgen.families.recording import eagerly
from postgen.families.timesteps import timestep_of
from postgen.fused.fp8_attention.apply import fp8_attention_for_call, progress_of
from postgen.fused.fp8_attention.report import FP8AttentionReport, ReportRow
from postgen.fused.fp8_attention.sdpa import divert_sdpa
from postgen.kernels.attention import naive as exact
from postgen.kernels.attention.backends import CUDNN_FP8, Call
from postgen.kernels.attention.ops import as_autocast, attention, router
from postgen.kernels.attention.router import milliseconds
from postgen.kernels.attention_fp8 import naive
from postgen.kernels.attention_fp8.ops import attention_fp8
from postgen.kernels.attention_fp8.preparation import CANDIDATES, Preparation

_NAME = "fp8_attention_calibration"
_QUERIES = 256
"""How many queries of a call are compared, spread evenly over the tokens; each of them attends to all keys."""


_MOST_STEPS = 1000
_OWN = {
    "prompt": "use the argument prompts of calibrate_fp8_attention",
    "prompt_embeds": "use the argument prompts of calibrate_fp8_attention, which are texts",
    "num_inference_steps": "use the argument steps of calibrate_fp8_attention",
    "generator": "use the argument seed of calibrate_fp8_attention",
    "fp8_attention": "calibration runs the pipeline with exact attention",
}
"""Arguments of a pipeline that calibration sets itself -> what the user does instead, or the reason."""


class Measurements:
    """The measured errors by layer, step and preparation (the worst of all calls), and the times by layer."""

    def __init__(self, candidates: Sequence[Preparation]) -> None:
        self.candidates = tuple(candidates)
        self.errors: dict[tuple[str, int], dict[Preparation, tuple[float, float]]] = {}
        """(layer, step) -> preparation -> relative L2 error over all heads, and of the worst head."""
        self.times: dict[str, tuple[float, float]] = {}
        """Layer -> milliseconds of one call of exact attention and of FP8 attention."""

    @torch.no_grad()
    def take(
        self, layer: str, step: int, query: Tensor, key: Tensor, value: Tensor, scale: float, lengths: Tensor | None
    ) -> None:
        """Measure one attention call with every candidate.

        Args:
            layer: the name of the attention module.
            step: the index of the denoising step.
            query: (B, N, H, D).
            key: (B, N, H, D).
            value: (B, N, H, D).
            scale: factor of the logits.
            lengths: key lengths (B,), or None.
        """
        tokens = query.shape[1]
        rows = torch.linspace(0, tokens - 1, min(tokens, _QUERIES), device=query.device).long()
        some = (x.float() for x in (query[:, rows], key, value))
        expected, _ = exact.attention(*some, scale=scale, key_lengths=lengths)
        found = self.errors.setdefault((layer, step), {})
        for candidate in self.candidates:
            out, _ = naive.attention_fp8(
                query, key, value, scale=scale, preparation=candidate, key_lengths=lengths, rows=rows
            )
            new, old = _errors(out.float(), expected), found.get(candidate, (0.0, 0.0))
            found[candidate] = _worse(new[0], old[0]), _worse(new[1], old[1])
        if layer not in self.times and query.is_cuda:
            self._time(layer, Call(query, key, value, scale, lengths, False))

    def _time(self, layer: str, call: Call) -> None:
        if router().why_not(CUDNN_FP8, call) is not None:
            return
        options = {"scale": call.scale, "key_lengths": call.key_lengths}
        runs: list[Callable[[], object]] = [
            functools.partial(attention, *call[:3], **options),
            functools.partial(attention_fp8, *call[:3], **options),
        ]
        # One of the kernels is Flex attention, which must be compiled.
        with torch.compiler.set_stance("default"):
            for run in runs:
                run()  # the first run chooses a kernel and builds its graph
            exact_ms, fp8_ms = (min(milliseconds(run, call.query.device) for _ in range(3)) for run in runs)
        self.times[layer] = exact_ms, fp8_ms

    def report(self, max_error: float, slack: float, steps: int) -> FP8AttentionReport:
        """Return the report; each layer gets the first candidate whose error is within `slack` of the best one."""
        layers = dict.fromkeys(layer for layer, _ in self.errors)
        chosen = {layer: self._chosen(layer, slack) for layer in layers}
        rows = []
        for layer in layers:
            steps_of_layer = sorted(step for name, step in self.errors if name == layer)
            rows += [self._row(layer, step, chosen[layer]) for step in steps_of_layer]
        return FP8AttentionReport(rows=tuple(rows), max_error=max_error, steps=steps)

    def _row(self, layer: str, step: int, chosen: Preparation) -> ReportRow:
        error, worst = self.errors[layer, step][chosen]
        exact_ms, fp8_ms = self.times.get(layer, (None, None))
        return ReportRow(
            layer=layer,
            step=step,
            error=error,
            worst_head=worst,
            preparation=str(chosen),
            exact_ms=exact_ms,
            fp8_ms=fp8_ms,
        )

    def _chosen(self, layer: str, slack: float) -> Preparation:
        own = [found for (name, _), found in self.errors.items() if name == layer]
        worst = {each: max(_or_infinite(found[each][0]) for found in own) for each in self.candidates}
        limit = slack * min(worst.values())
        return next((each for each in self.candidates if worst[each] <= limit), self.candidates[-1])


class _Probe:
    """Measures the attention calls of one module without changing their results."""

    def __init__(self, found: Measurements, layer: str, step: Callable[[], int], calls_sdpa: bool) -> None:
        self._found, self._layer, self._step, self._calls_sdpa = found, layer, step, calls_sdpa

    def around(self, inner: Callable[..., Any], module: Any, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as open_:
            if self._calls_sdpa:
                open_.enter_context(divert_sdpa(self.look))
            open_.enter_context(divert_dispatched(self.look))
            return inner(module, *args, **kwargs)

    def look(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: float | None, lengths: Tensor | None
    ) -> None:
        if mask is None and query.shape[1:3] == key.shape[1:3]:
            given = query.shape[-1] ** -0.5 if scale is None else scale
            step = self._step()
            query, key, value = as_autocast(query, key, value)
            with torch.autocast(query.device.type, enabled=False):
                self._found.take(self._layer, step, query, key, value, given, lengths)


def calibrate_fp8_attention(
    pipe: Any,
    prompts: Iterable[str],
    *,
    steps: int = 4,
    call: Mapping[str, Any] | None = None,
    max_error: float = 0.1,
    slack: float = 1.03,
    candidates: Sequence[Preparation] = CANDIDATES,
    seed: int = 0,
) -> FP8AttentionReport:
    """Run a pipeline for a few steps and measure the error of FP8 attention in each layer and step.

    The errors are measured on the model's own queries, keys and values, on any device. They are those of the reference
    in plain torch (`postgen.kernels.attention_fp8.naive`), which rounds like cuDNN, on 256 queries of each call. On a
    GPU with FP8 attention, exact and FP8 attention are also timed. The pipeline itself computes exact attention, so
    its results do not change. Calls with a mask are not measured; they stay exact when FP8 attention is applied.

    Args:
        pipe: a diffusers video pipeline.
        prompts: one prompt or several; the report holds the worst error over all of them.
        steps: the number of denoising steps of each call (`num_inference_steps`); every step is measured. Pipelines
            without this argument (Helios Pyramid, LTX-2 DFR) run the steps that `call` sets.
        call: further arguments of the pipeline. Use the same height, width and num_frames as later.
        max_error: layers with a larger relative L2 error in any step stay exact.
        slack: each layer gets the first candidate whose error is at most `slack` times the smallest error.
        candidates: the preparations to compare, from the cheapest to the most expensive.
        seed: the seed of the initial noise.

    Returns:
        The report, which computes the settings for `apply_fp8_attention`.

    Raises:
        UserError: `pipe` is no pipeline, there are no prompts, the attention of the model is unknown, an argument is
            invalid, or there was no attention call without a mask.

    Example:
        report = calibrate_fp8_attention(pipe, ["a ball"], call={"height": 480, "width": 832, "num_frames": 81})
        print(report.table())
        report.save("fp8_attention.json")
        apply_fp8_attention(pipe, report.config())
    """
    texts, candidates = _listed(prompts), _listed(candidates)
    _check(pipe, texts, steps, max_error, slack, candidates)
    _check_call(pipe, {} if call is None else call, seed)
    found, progress = Measurements(candidates), progress_of(pipe)
    counts = "num_inference_steps" in inspect.signature(pipe.__call__).parameters
    # torch.compile cannot trace the measurement, so compiled blocks run eagerly.
    with fp8_attention_for_call(pipe, False), _probing(pipe, found, progress), eagerly():
        for prompt in texts:
            generator = torch.Generator().manual_seed(seed)
            # Pass the prompt by name: the first argument of a pipeline may be an image.
            words = {"prompt": prompt, "num_inference_steps": steps, "generator": generator}
            if not counts:
                del words["num_inference_steps"]
            pipe(**{"output_type": "latent", **(call or {}), **words})
    if not found.errors:
        raise UserError(
            "every self-attention call had a mask, or there was none: FP8 attention would have no effect. For"
            " HunyuanVideo call postgen.apply_fused_ops before, which turns the text mask into key lengths"
        )
    return found.report(max_error, slack, steps if counts else 1 + max(step for _, step in found.errors))


@contextmanager
def _probing(pipe: Any, found: Measurements, progress: PipelineProgress) -> Iterator[None]:
    """Measure every attention call of the pipeline's transformers inside a `with` block."""
    install_attention_tap()
    with ExitStack() as undo:
        for model in transformers_of(pipe).values():
            tokens, stack = video_tokens_of(model), processor_stack(model)
            arguments: dict[str, Any] = {}

            # The step is computed from the timestep of the transformer's forward, so a hook keeps the latest one.
            def remember(module: Any, args: Any, kwargs: Any, into: dict[str, Any] = arguments) -> None:
                into["timestep"] = timestep_of(module, args, kwargs)

            def step(into: dict[str, Any] = arguments, model: Any = model) -> int:
                done: int = progress.step(into, model)[0]
                return done

            hook = model.register_forward_pre_hook(remember, with_kwargs=True)
            undo.callback(hook.remove)
            names = [name for name in tokens.attention_modules(model) if name not in stack.changed_layers]
            sdpa = tokens.attention_call == "sdpa"
            stack.push(_NAME, {name: _Probe(found, name, step, sdpa).around for name in names})
            undo.callback(stack.pop, _NAME)
        yield


def _check(
    pipe: Any, prompts: Sequence[str], steps: int, max_error: float, slack: float, candidates: Sequence[Preparation]
) -> None:
    if "" in transformers_of(pipe):
        raise UserError("calibration calls the whole pipeline: pass the pipeline, not its transformer")
    if not prompts or not all(isinstance(each, str) for each in prompts):
        raise UserError(f"prompts must be one or more texts, got {shown(prompts)}")
    if not is_whole(steps, 1, _MOST_STEPS):
        raise UserError(f"steps must be a whole number from 1 to {_MOST_STEPS:,}, got {shown(steps)}")
    if not is_number(max_error) or not max_error > 0:
        raise UserError(f"max_error must be a number above 0, got {shown(max_error)}")
    if not is_number(slack) or not slack >= 1:
        raise UserError(f"slack must be a number of at least 1, got {shown(slack)}")
    if not candidates or not all(isinstance(each, Preparation) for each in candidates):
        raise UserError(
            "candidates must be one or more objects postgen.kernels.attention_fp8.preparation.Preparation, got"
            f" {shown(candidates)}"
        )


def _check_call(pipe: Any, call: Any, seed: Any) -> None:
    if not isinstance(call, Mapping) or not all(isinstance(name, str) for name in call):
        raise UserError(f"call must be a dict of arguments of the pipeline by name, got {shown(call)}")
    if own := sorted(_OWN.keys() & call.keys()):
        raise UserError(f"call must not contain {own[0]}: {_OWN[own[0]]}")
    known = inspect.signature(pipe.__call__).parameters
    takes_any = any(each.kind is each.VAR_KEYWORD for each in known.values())
    if not takes_any and (unknown := sorted(call.keys() - known.keys())):
        near = did_you_mean(unknown[0], known)
        raise UserError(f"{type(pipe).__name__} has no argument {shown(unknown[0])}: remove it from call.{near}")
    if not is_whole(seed, 0, 2**63 - 1):
        raise UserError(f"seed must be a whole number from 0 to 2**63 - 1, got {shown(seed)}")


def _listed(given: Any) -> list[Any]:
    """Return an iterable as a list; a text or another value becomes the only item, which is checked later."""
    return [given] if isinstance(given, str) or not isinstance(given, Iterable) else list(given)


def _errors(out: Tensor, expected: Tensor) -> tuple[float, float]:
    """Return the relative L2 errors over all heads and of the worst head.

    The error of a head whose expected output is all zeros is its absolute L2 error.
    """
    squares = (out - expected).double().square().sum((1, 3)), expected.double().square().sum((1, 3))
    heads = torch.where(squares[1] == 0, squares[0], squares[0] / squares[1]).sqrt()
    return float((squares[0].sum() / squares[1].sum().clamp_min(1e-300)).sqrt()), float(heads.max())


def _worse(new: float, old: float) -> float:
    """Return the larger error; NaN counts as larger than every number."""
    return new if not new <= old else old


def _or_infinite(error: float) -> float:
    return error if error == error else float("inf")
