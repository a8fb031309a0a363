"""What each reward means, for people: one line, and the range of its score. Light to import."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class About:
    """What a reward means."""

    says: str
    """What a high score says of a clip."""
    range: str
    """Where its scores lie."""


ABOUT = {
    "aesthetic": About("People would call its frames beautiful; the prompt plays no part.", "1 to 10"),
    "brisque": About("Its frames look clean as a photograph does: no blur, no noise, no blocks.", "about 0 to 1"),
    "brightness_band": About("It is neither too dark nor burnt out.", "0 to 1, 1 is sound"),
    "clip_score": About("Its frames fit the words of the prompt.", "about 0.1 to 0.4"),
    "conse": About("The things that are seen in its frames fit the words of the prompt.", "about 0.05 to 0.6"),
    "depth_consistency": About("Its depth maps keep their values along the motion.", "0 to 1"),
    "dynamic_degree": About("Something moves clearly.", "0 or 1"),
    "flow_smoothness": About("What moves does so evenly, without jerks; a frozen clip counts as even.", "0 to 1"),
    "geneval_hf": About("Its objects have the number, the colours and the places that were asked for.", "0 or 1"),
    "hps_v2_1": About("People would prefer its frames for this prompt (HPS v2.1).", "about 0.2 to 0.37"),
    "hps_v3": About("People would prefer its frames for this prompt (HPSv3).", "about -5 to 15"),
    "image_reward": About("People would prefer its frames for this prompt (ImageReward).", "about -2 to 2"),
    "motion_floor": About("It is not frozen.", "0 to 1, 1 is sound"),
    "ocr": About("The text in double quotes in the prompt can be read in its frames.", "0 to 1"),
    "parabola": About("What falls, flies or bounces follows one gravity.", "0 to 1"),
    "permanence": About("No body vanishes without a reason, turns up or leaps.", "0 to 1"),
    "pickscore": About("People would prefer its frames for this prompt (PickScore).", "about 18 to 24"),
    "sharpness_band": About("It is neither blurred nor over-sharpened.", "0 to 1, 1 is sound"),
    "vbench_aesthetic": About("People would call its frames beautiful (VBench).", "0 to 1"),
    "vbench_background": About("The scene stays the same through the clip (VBench).", "0 to 1"),
    "vbench_flicker": About(
        "Frames that follow each other differ little (VBench); a frozen clip scores best.", "0 to 1"
    ),
    "vbench_subject": About("The subject stays the same through the clip (VBench).", "0 to 1"),
    "videoalign": About(
        "It looks good, moves well and fits the prompt (VideoAlign, the sum of three).", "about -6 to 6"
    ),
    "videoalign_mq": About("It moves well (VideoAlign).", "about -2 to 2"),
    "videoalign_ta": About("It fits the prompt (VideoAlign).", "about -2 to 2"),
    "videoalign_vq": About("It looks good (VideoAlign).", "about -2 to 2"),
    "world": About("Bodies, colours, shapes, events and camera are those of the prompt (exact judge).", "0 to 1"),
    "world_clip": About("A small network finds that it fits the prompt (synthetic world).", "-1 to 1"),
    "world_judge": About(
        "A small network finds that it looks and moves well (synthetic world).",
        "up to about 1, below 0 for spoilt clips",
    ),
    "world_judge_motion": About(
        "A small network finds that it moves well (synthetic world).", "up to about 1, below 0 for spoilt clips"
    ),
    "world_judge_visual": About(
        "A small network finds that it looks well (synthetic world).", "up to about 1, below 0 for spoilt clips"
    ),
}
"""By the names of `known_rewards()`."""
