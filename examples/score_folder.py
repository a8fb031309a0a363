"""Score every video of a folder with several rewards, and print a table.

    python examples/score_folder.py [FOLDER]

Without a folder, the example first renders two clips: one that shows its prompt and one that does not. The prompt of a
video comes from its sidecar (`x.json` beside `x.mp4`), which `postgen generate` writes. Writes `out/scores.csv`.
The same on the command line: postgen score FOLDER --reward world,motion_floor -o scores.csv
"""

import csv
import json
import sys
from pathlib import Path

import postgen
from postgen import world
from postgen.rewards import RewardRunner
from postgen.rewards.scoring import find_clips, score_clips, set_prompts

REWARDS = ["world", "motion_floor", "sharpness_band"]


def render_two(folder: Path) -> None:
    """Render a scene twice: once with its own prompt in the sidecar, once with another prompt."""
    for name, prompt in (("right", "a red ball rolls left"), ("wrong", "a blue cube falls")):
        clip = world.render([world.parse("a red ball rolls left")], num_frames=17, size=96).rgb_BF3HW[0]
        postgen.write_video(folder / f"{name}.mp4", clip, fps=8)
        (folder / f"{name}.json").write_text(json.dumps({"prompt": prompt}), encoding="utf-8")


def main() -> None:
    """Find the clips, read their prompts, score the clips and write the table."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "out/clips")
    if not folder.is_dir():
        folder.mkdir(parents=True)
        render_two(folder)
    clips = find_clips([folder])
    set_prompts(clips, None, None)  # None, None: take the prompts from the sidecars
    score_clips(clips, RewardRunner(REWARDS))
    with Path("out/scores.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, ["file", "prompt", *REWARDS], extrasaction="ignore")
        table.writeheader()
        table.writerows(clip.to_dict(REWARDS) for clip in clips)
    print(Path("out/scores.csv").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
