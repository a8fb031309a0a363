"""Videos of the synthetic world with captions, as a folder to fine-tune a model on (docs/sft.md).

    python examples/world_clips.py --count 32 --size 64 --num-frames 17

Writes `out/world-clips` with NAME.mp4 and its caption NAME.txt, and `out/world-held-out` with a quarter as many.
"""

import argparse
from pathlib import Path

import postgen
from postgen import world
from postgen.world.scenes import FIRST_TRAINING_SEED, draw_scenes


def write_clips(folder: Path, seed: int, count: int, *, size: int, num_frames: int) -> None:
    """Write the clips of consecutive scenes."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, scene in enumerate(draw_scenes(seed, count, num_frames, captions=1)):
        frames = world.render([scene.spec], num_frames=num_frames, size=size)
        postgen.write_video(folder / f"{number:05d}.mp4", frames.rgb_BF3HW[0], fps=8)
        (folder / f"{number:05d}.txt").write_text(scene.captions[0], encoding="utf-8")


def main() -> None:
    """Write a folder to train on, and one with other scenes to evaluate with."""
    parser = argparse.ArgumentParser(description="Writes videos of the synthetic world with captions.")
    parser.add_argument("-o", "--out", type=Path, default=Path("out"), help="folder of both folders")
    parser.add_argument("--count", type=int, default=32, help="number of videos to train on")
    parser.add_argument("--size", type=int, default=64, help="height and width in pixels")
    parser.add_argument("--num-frames", type=int, default=17, help="frames of a video")
    args = parser.parse_args()
    shape = {"size": args.size, "num_frames": args.num_frames}
    counts = {args.out / "world-clips": args.count, args.out / "world-held-out": max(1, args.count // 4)}
    if args.count < 1:
        parser.error(f"--count is {args.count}, it must be at least 1")
    for folder, count in counts.items():
        if len(list(folder.glob("*.mp4"))) > count:  # they would be trained on, too
            parser.error(f"{folder} has more clips, of an earlier call: remove it, or name another folder with -o")
    for (folder, count), seed in zip(counts.items(), (FIRST_TRAINING_SEED, 0), strict=True):
        write_clips(folder, seed, count, **shape)


if __name__ == "__main__":
    main()
