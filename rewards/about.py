"""A one-line description of each reward and the range of its scores, for users. This module is light to import."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class About:
    """A description of a reward for users."""

    says: str
    """What a high score means for a clip."""
    range: str
    """The range of the scores."""


ABOUT = {
    "aesthetic": About("People would find its frames beautiful; the prompt is not used.", "1 to 10"),
    "brisque": About("Its frames look as clean as a photograph: no blur, noise or block artefacts.", "about 0 to 1"),
    "brightness_band": About("It is neither too dark nor over-exposed.", "0 to 1, 1 is sound"),
    "clip_score": About("Its frames match the prompt.", "about 0.1 to 0.4"),
    "conse": About("The objects in its frames match the prompt.", "about 0.05 to 0.6"),
    "depth_consistency": About("Its depth maps are consistent with the motion and the edges of its frames.", "0 to 1"),
    "dynamic_degree": About("It shows clear motion.", "0 or 1"),
    "flow_smoothness": About("Its motion is even, without jerks; a frozen clip counts as even.", "0 to 1"),
    "geneval_hf": About("Its objects have the number, colours and positions that the prompt asks for.", "0 or 1"),
    "hps_v2_1": About("People would prefer its frames for this prompt (HPS v2.1).", "about 0.2 to 0.37"),
    "hps_v3": About("People would prefer its frames for this prompt (HPSv3).", "about -5 to 15"),
    "image_reward": About("People would prefer its frames for this prompt (ImageReward).", "about -2 to 2"),
    "motion_floor": About("It is not frozen.", "0 to 1, 1 is sound"),
    "ocr": About("The text that the prompt puts in double quotes can be read in its frames.", "0 to 1"),
    "parabola": About("Bodies that fall, fly or bounce follow one gravity.", "0 to 1"),
    "permanence": About("No body vanishes without a reason, appears from nowhere or jumps.", "0 to 1"),
    "pickscore": About("People would prefer its frames for this prompt (PickScore).", "about 18 to 24"),
    "sharpness_band": About("It is neither blurred nor over-sharpened.", "0 to 1, 1 is sound"),
    "vbench_aesthetic": About("People would find its frames beautiful (VBench).", "0 to 1"),
    "vbench_background": About("The scene stays the same throughout the clip (VBench).", "0 to 1"),
    "vbench_flicker": About("Consecutive frames differ little (VBench); a frozen clip scores best.", "0 to 1"),
    "vbench_subject": About("The subject stays the same throughout the clip (VBench).", "0 to 1"),
    "videoalign": About(
        "It looks good, moves well and matches the prompt (VideoAlign, the sum of three).", "about -6 to 6"
    ),
    "videoalign_mq": About("It moves well (VideoAlign).", "about -2 to 2"),
    "videoalign_ta": About("It matches the prompt (VideoAlign).", "about -2 to 2"),
    "videoalign_vq": About("It looks good (VideoAlign).", "about -2 to 2"),
    "world": About("Its bodies, colours, shapes, events and camera match the prompt (exact judge).", "0 to 1"),
    "world_clip": About("It matches the prompt, according to a small network (synthetic world).", "-1 to 1"),
    "world_judge": About(
        "It looks and moves well, according to a small network (synthetic world).",
        "up to about 1, below 0 for corrupted clips",
    ),
    "world_judge_motion": About(
        "It moves well, according to a small network (synthetic world).", "up to about 1, below 0 for corrupted clips"
    ),
    "world_judge_visual": About(
        "It looks good, according to a small network (synthetic world).", "up to about 1, below 0 for corrupted clips"
    ),
    "world_motion": About("It moves as much as the exact clip of its scene (synthetic world).", "0 to 1, 1 is sound"),
}
"""Name of a reward, as in `known_rewards()` -> its description."""
