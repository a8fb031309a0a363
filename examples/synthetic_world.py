"""The synthetic world: render a scene with exact depth and flow, and judge a clip from its pixels.

    python examples/synthetic_world.py

Writes `out/world.mp4` (RGB on the left, depth on the right) and `out/world.png`.
"""

import postgen
from postgen import world
from postgen.world.check import check

PROMPT = "a red ball rolls left"


def main() -> None:
    """Render a prompt, then judge the clip with this prompt and with another prompt."""
    scene = world.parse(PROMPT)
    frames = world.render([scene], num_frames=17, size=96)
    clip, depth = frames.rgb_BF3HW[0], frames.depth_BFHW[0]
    print(f"caption: {world.simple_caption(scene)}; largest motion: {frames.flow_BF2HW[0].abs().max():.1f} pixels")
    for prompt in (PROMPT, "a blue cube falls"):
        report = check(clip, prompt)
        print(f"{prompt!r}: everything right: {report.all_right}, score {report.score:.3f}")

    near = 1 / depth
    grey = ((near - near.min()) / (near.max() - near.min()))[:, None].expand(-1, 3, -1, -1)
    pair = list(postgen.side_by_side(clip, grey))
    postgen.write_video("out/world.mp4", pair, fps=8)
    postgen.contact_sheet(pair, "out/world.png", title=PROMPT)


if __name__ == "__main__":
    main()
