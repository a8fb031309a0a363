"""GenEval (arXiv 2310.11513) on transformers' Mask2Former: checks objects, their number, colours and positions.

The official detector is mmdet's Mask2Former with other weights, so scores differ: report them as `geneval_hf`, never
beside official numbers. CLIP L/14 classifies the colour of an object, cut out on a grey background.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

from postgen.errors import UserError
from postgen.rewards.base import Clip, RewardModel, promptless, streaming
from postgen.rewards.clip_score import ClipScore
from postgen.rewards.frames import REDUCTIONS, check_frames, uniform_frames
from postgen.rewards.pictures import IMAGENET_MEAN, IMAGENET_STD, clip_pixels, normalise
from postgen.rewards.weights import fill, find_file, pretrained, read_state

CONFIDENCE, COUNTING_CONFIDENCE = 0.3, 0.9
MOST_OBJECTS = 16
MARGIN = 0.1
"""A distance must exceed this part of the sum of both sizes to count as a position."""
GREY = 0.6
SIDE = 384

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {colour} {thing}", "a photo of a {colour}-colored {thing}", "a photo of a {colour} object")

# COCO's 80 classes in the detector's order, as GenEval spells them.
_CLASSES = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,"
    "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,"
    "skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,"
    "cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,computer mouse,tv remote,computer keyboard,cell phone,microwave,"
    "oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"
)
CLASSES = _CLASSES.split(",")


@dataclass(frozen=True, slots=True)
class Thing:
    """One detected object."""

    box: tuple[float, float, float, float]
    """Left, top, right, bottom in px."""
    mask: Tensor
    """(H,W), true inside."""
    score: float


Things = Mapping[str, Sequence[Thing]]
"""Class name -> detected objects, highest score first."""


def detected(class_logits_QC: Tensor, mask_logits_QHW: Tensor, size: tuple[int, int], confidence: float) -> Things:
    """Turn the predictions for one frame into objects, as Mask2Former's post-processing does.

    Args:
        class_logits_QC: logits of Q queries over the classes and "no object".
        mask_logits_QHW: logits of the masks, at any resolution.
        size: height and width of the frame.
        confidence: threshold; an object needs a larger product of class probability and mean probability in its mask.
    """
    count = len(class_logits_QC)
    chances, places = class_logits_QC.softmax(-1)[:, :-1].flatten().topk(count)
    logits = interpolate(mask_logits_QHW[None], (SIDE, SIDE), mode="bilinear", align_corners=False)[0]
    queries, classes = places // (class_logits_QC.shape[1] - 1), places % (class_logits_QC.shape[1] - 1)
    inside = logits > 0
    sure = ((logits.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6))[queries] * chances
    found: dict[str, list[Thing]] = {}
    for k in sure.argsort(descending=True).tolist():
        mask = interpolate(inside[queries[k]][None, None].float(), size, mode="nearest")[0, 0] > 0
        things = found.setdefault(CLASSES[int(classes[k])], [])
        if float(sure[k]) > confidence and len(things) < MOST_OBJECTS and bool(mask.any()):
            rows, columns = (torch.nonzero(mask.any(axis))[:, 0] for axis in (1, 0))
            box = (float(columns[0]), float(rows[0]), float(columns[-1]) + 1, float(rows[-1]) + 1)
            things.append(Thing(box, mask, float(sure[k])))
    return {name: things for name, things in found.items() if things}


def positions(a: Thing, b: Thing) -> set[str]:
    """Return all positions of a relative to b that hold, from "left of", "right of", "above", "below"."""
    box_a, box_b = torch.tensor(a.box).view(2, 2), torch.tensor(b.box).view(2, 2)
    offset = box_a.mean(0) - box_b.mean(0)
    margin = MARGIN * ((box_a[1] - box_a[0]).abs() + (box_b[1] - box_b[0]).abs())
    beyond = (offset.abs() - margin).clamp(min=0) * offset.sign()
    if bool((beyond.abs() < 1e-3).all()):
        return set()
    x, y = (beyond / offset.norm()).tolist()
    told = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, holds in told.items() if holds}


class Detector(nn.Module):
    """Mask2Former with its classifier. The class of transformers for both needs SciPy for a loss that is unused here.

    Args:
        body: a `Mask2FormerModel`.
        classes: layer from the width of the body to the classes and "no object".
    """

    def __init__(self, body: nn.Module, classes: nn.Module) -> None:
        super().__init__()
        self.body, self.classes = body, classes

    def forward(self, pixels_K3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Return the class logits (K,Q,C) and mask logits (K,Q,h,w) of the last layer."""
        answers = self.body(pixels_K3HW, output_hidden_states=True)
        states = answers.transformer_decoder_intermediate_states[-1].transpose(0, 1)
        return self.classes(states), answers.masks_queries_logits[-1]


@streaming
@promptless
class GenevalHF(RewardModel):
    """Check whether a frame shows what GenEval's record of its prompt asks for.

    Args:
        model: Hub id or local folder of a Mask2Former for COCO's instances.
        clip: Hub id or local folder of CLIP L/14.
        graded: return the mean over the requested objects of 1 - |wanted - found| / wanted, the share of right
            colours and the position, as in Flow-GRPO; otherwise 1 if everything is right and 0 if not, as in GenEval.
        frames, reduce: see `FrameReward`.
        device, dtype: see `RewardModel`.

    Raises:
        UserError: fewer than one frame, or an unknown `reduce`.
    """

    name = "geneval_hf"

    def __init__(
        self,
        model: str = "facebook/mask2former-swin-small-coco-instance",
        clip: str = "openai/clip-vit-large-patch14",
        graded: bool = False,
        frames: int = 1,
        reduce: str = "mean",
        **place: Any,
    ) -> None:
        super().__init__(**place)
        check_frames(frames, reduce)
        self.model, self.graded, self.frames, self.reduce = model, graded, frames, reduce
        self.clip = ClipScore(clip, **place)
        self._colours: dict[str, Tensor] = {}

    def needed(self) -> Sequence[tuple[str, str]]:
        """Return the places of the detector and CLIP."""
        return ((self.model, ""), *self.clip.needed())

    def build(self) -> nn.Module:
        """Load the detector.

        Raises:
            UserError: the detector cannot be found, or was trained on other classes.
        """
        from transformers import Mask2FormerModel

        body = pretrained(Mask2FormerModel, self.model)
        if body.config.num_labels != len(CLASSES):
            raise UserError(
                f"{self.model} has {body.config.num_labels} classes: give a model with COCO's {len(CLASSES)} classes"
            )
        path = find_file(self.model, "model.safetensors")
        start = "class_predictor."
        head = {k.removeprefix(start): weight for k, weight in read_state(path).items() if k.startswith(start)}
        return Detector(body, fill(nn.Linear(body.config.hidden_dim, len(CLASSES) + 1), head, path))

    def offload(self) -> None:
        """Free the accelerator memory of both networks."""
        super().offload()
        self.clip.offload()

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[Clip],
        *,
        geneval: Sequence[Mapping[str, Any] | None],
        log_reasons: Any = None,
    ) -> list[float | None]:
        """Score clips.

        Args:
            prompts: unused; the record states the requested objects.
            completions: clips of any size.
            geneval: column of GenEval's records, {"tag", "include": [{"class", "count", "color", "position"}],
                "exclude": [{"class", "count"}]}.
            log_reasons: receives the reasons of missing scores.

        Returns:
            One score in [0,1] per clip; None without a record.

        Raises:
            UserError: a record names an unknown class, colour or position, or a count below 1.
        """
        self.load()
        if log_reasons is not None:
            log_reasons(["the column `geneval` has no record for it" if r is None else None for r in geneval])
        scores: list[float | None] = []
        for clip, record in zip(completions, geneval, strict=True):
            if record is None:
                scores.append(None)
                continue
            check_record(record)
            frames = uniform_frames(clip, self.frames).to(self.device, torch.float32)
            values = [self.judge(frame, things, record) for frame, things in self._seen(frames, record)]
            scores.append(float(REDUCTIONS[self.reduce](torch.tensor(values))))
        return scores

    def _seen(self, frames_K3HW: Tensor, record: Mapping[str, Any]) -> list[tuple[Tensor, Things]]:
        sized = interpolate(frames_K3HW, (SIDE, SIDE), mode="bilinear", antialias=True)
        classes_KQC, masks_KQHW = self.net(normalise(sized, IMAGENET_MEAN, IMAGENET_STD).to(self.dtype))
        confidence = COUNTING_CONFIDENCE if record.get("tag") == "counting" else CONFIDENCE
        height, width = frames_K3HW.shape[-2:]
        logits = zip(classes_KQC.float(), masks_KQHW.float(), strict=True)
        found = [detected(classes, masks, (height, width), confidence) for classes, masks in logits]
        return list(zip(frames_K3HW, found, strict=True))

    def judge(self, frame_3HW: Tensor, things: Things, record: Mapping[str, Any]) -> float:
        """Score one frame from its detected objects."""
        parts: list[list[float]] = []
        groups: list[Sequence[Thing] | None] = []
        # Each requested object gives a list of values: its count, then colour and position if requested.
        for asked in record.get("include", []):
            found = things.get(asked["class"], [])
            chosen = found[: asked["count"]]
            enough = len(chosen) == asked["count"]
            miscount = abs(asked["count"] - len(found)) / asked["count"]
            parts.append([max(0.0, 1 - miscount) if self.graded else float(enough)])
            if "color" in asked:
                told = self.colours(frame_3HW, chosen, asked["class"])
                parts[-1].append(told.count(asked["color"]) / asked["count"])
            if "position" in asked:
                parts[-1].append(_placed(chosen if enough else None, groups, *asked["position"]))
            groups.append(chosen if enough and min(parts[-1][1:], default=1.0) == 1 else None)
        spared = all(len(things.get(none["class"], [])) < none["count"] for none in record.get("exclude", []))
        if not self.graded:
            return float(spared and all(value == 1 for item in parts for value in item))
        return sum(sum(item) / len(item) for item in parts) / max(len(parts), 1)

    def colours(self, frame_3HW: Tensor, things: Sequence[Thing], name: str) -> list[str]:
        """Return the most likely of ten colours for each object."""
        if not things:
            return []
        self.clip.load(self.device)
        if name not in self._colours:
            texts = [t.format(colour=colour, thing=name) for colour in COLOURS for t in TEMPLATES]
            features = self.clip.text_features(texts).unflatten(0, (len(COLOURS), len(TEMPLATES)))
            self._colours[name] = normalize(features.mean(1), dim=-1)
        crops = [clip_pixels(_cut(frame_3HW, thing)[None], self._clip_side, half_even=True) for thing in things]
        states = self.clip.net.vision_model(torch.cat(crops).to(self.dtype)).pooler_output
        seen = normalize(self.clip.net.visual_projection(states).float(), dim=-1)
        return [COLOURS[k] for k in (seen @ self._colours[name].to(seen.device).T).argmax(-1).tolist()]

    @property
    def _clip_side(self) -> int:
        return int(self.clip.net.config.vision_config.image_size)


def _cut(frame_3HW: Tensor, thing: Thing) -> Tensor:
    left, top, right, bottom = (round(edge) for edge in thing.box)
    mask = thing.mask.to(frame_3HW.device)
    return torch.where(mask, frame_3HW, GREY)[:, top:bottom, left:right]


def _placed(chosen: Sequence[Thing] | None, groups: Sequence[Sequence[Thing] | None], where: str, group: int) -> float:
    """Return 1 if every chosen object has the given position relative to every object of an earlier group, else 0."""
    targets = groups[group] if group < len(groups) else None
    if not chosen or targets is None:
        return 0.0
    return float(all(where in positions(thing, target) for thing in chosen for target in targets))


def check_record(record: Mapping[str, Any]) -> None:
    """Check that the detector and the colour classifier can evaluate a record.

    Raises:
        UserError: an unknown class, colour or position, or a count below 1.
    """
    for asked in [*record.get("include", []), *record.get("exclude", [])]:
        if asked.get("class") not in CLASSES:
            raise UserError(f"geneval asks for the unknown class {asked.get('class')!r}: known are COCO's 80")
        if not isinstance(asked.get("count"), int) or asked["count"] < 1:
            raise UserError(
                f"geneval asks for {asked.get('count')!r} of {asked['class']}: the count must be at least 1"
            )
        if asked.get("color", "red") not in COLOURS:
            raise UserError(f"geneval asks for the colour {asked['color']!r}: known are {', '.join(COLOURS)}")
        if asked.get("position", ["above"])[0] not in ("left of", "right of", "above", "below"):
            raise UserError(
                f"geneval asks for the position {asked['position'][0]!r}: known are above, below, left of, right of"
            )
