"""The words of the world: the same tables are used to write captions and to read prompts."""

from __future__ import annotations

#: The first word of each entry is the canonical one.
SHAPE_WORDS: dict[str, tuple[str, ...]] = {
    "ball": ("ball", "sphere"),
    "cube": ("cube", "box", "block"),
    "cylinder": ("cylinder", "pillar", "can"),
}
SIZE_WORDS: dict[str, tuple[str, ...]] = {
    "small": ("small", "little", "tiny"),
    "medium": ("medium", "medium-sized"),
    "large": ("large", "big"),
}
#: Words that a prompt may use instead of the eight colour names; captions never use them.
COLOUR_SYNONYMS: dict[str, str] = {
    "crimson": "red",
    "scarlet": "red",
    "golden": "yellow",
    "lime": "green",
    "emerald": "green",
    "turquoise": "cyan",
    "teal": "cyan",
    "navy": "blue",
    "violet": "purple",
    "magenta": "pink",
}

#: At least five phrases for each event. {roll} becomes "rolls" for a ball and "slides" for the other shapes; {other}
#: becomes the partner.
EVENT_PHRASES: dict[str, tuple[str, ...]] = {
    "moves left": (
        "moves left",
        "{roll} left",
        "{roll} to the left",
        "moves to the left",
        "goes from right to left",
        "travels left across the floor",
        "heads left",
    ),
    "moves right": (
        "moves right",
        "{roll} right",
        "{roll} to the right",
        "moves to the right",
        "goes from left to right",
        "travels right across the floor",
        "heads right",
    ),
    "moves closer": (
        "moves closer",
        "{roll} closer",
        "comes closer",
        "{roll} toward the camera",
        "approaches the camera",
        "moves toward the viewer",
    ),
    "moves away": (
        "moves away",
        "{roll} away",
        "goes away from the camera",
        "{roll} into the distance",
        "moves away from the viewer",
        "recedes",
    ),
    "stays": ("stays still", "stands still", "does not move", "stays in place", "rests on the floor", "remains still"),
    "bounces": (
        "bounces",
        "bounces up and down",
        "bounces on the floor",
        "keeps bouncing",
        "jumps up and down",
        "is bouncing",
    ),
    "falls": (
        "falls",
        "falls down",
        "falls to the floor",
        "drops to the floor",
        "drops down and lands",
        "is dropped",
    ),
    "collides": (
        "hits {other}",
        "collides with {other}",
        "bumps into {other}",
        "{roll} into {other}",
        "crashes into {other}",
    ),
    "passes behind": (
        "passes behind {other}",
        "moves behind {other} and reappears",
        "goes behind {other} and comes out again",
        "{roll} behind {other}",
        "disappears behind {other} and reappears",
    ),
}
PLACE_PHRASES: dict[str, tuple[str, ...]] = {
    "left": ("on the left", "at the left", "on the left side", "to the left of the middle", "in the left half"),
    "middle": ("in the middle", "in the center", "at the center", "in the centre", "near the middle"),
    "right": ("on the right", "at the right", "on the right side", "to the right of the middle", "in the right half"),
}
CAMERA_PHRASES: dict[str, tuple[str, ...]] = {
    "static": ("static camera", "the camera stays still", "fixed camera", "still camera", "the camera does not move"),
    "pan left": (
        "the camera pans left",
        "camera pan left",
        "panning left",
        "the camera turns left",
        "pan to the left",
    ),
    "pan right": (
        "the camera pans right",
        "camera pan right",
        "panning right",
        "the camera turns right",
        "pan to the right",
    ),
    "orbit left": (
        "the camera orbits left",
        "orbit left",
        "the camera circles left",
        "camera orbiting left",
        "the camera goes around to the left",
    ),
    "orbit right": (
        "the camera orbits right",
        "orbit right",
        "the camera circles right",
        "camera orbiting right",
        "the camera goes around to the right",
    ),
    "dolly in": ("the camera moves in", "dolly in", "the camera dollies in", "zooming in", "the camera comes nearer"),
    "dolly out": (
        "the camera moves out",
        "dolly out",
        "the camera dollies out",
        "zooming out",
        "the camera backs off",
    ),
    "dolly return": (
        "the camera moves in and back",
        "dolly in and back",
        "the camera dollies in and returns",
        "zooming in and out",
        "the camera comes nearer and goes back",
    ),
}
#: Camera phrases that prompts may use and `world.caption` never writes.
CAMERA_FORMS: dict[str, tuple[str, ...]] = {
    "static": ("the camera is still", "the camera is fixed"),
    "pan left": ("the camera pans to the left", "the camera is panning left", "the camera turns to the left"),
    "pan right": ("the camera pans to the right", "the camera is panning right", "the camera turns to the right"),
    "orbit left": ("the camera orbits to the left", "the camera is orbiting left", "the camera circles to the left"),
    "orbit right": (
        "the camera orbits to the right",
        "the camera is orbiting right",
        "the camera circles to the right",
    ),
    "dolly in": ("the camera moves closer", "the camera moves forward", "the camera is zooming in"),
    "dolly out": ("the camera moves away", "the camera moves back", "the camera is zooming out"),
    "dolly return": ("the camera moves closer and back", "the camera is zooming in and out"),
}
CAMERA_READINGS: dict[str, tuple[str, ...]] = {
    move: (*phrases, *CAMERA_FORMS[move]) for move, phrases in CAMERA_PHRASES.items()
}
"""All phrases for each camera move."""
BACKGROUND_PHRASES: dict[str, tuple[str, ...]] = {
    "grey": ("on a grey floor", "on a gray floor", "on grey ground", "over a grey floor", "grey floor"),
    "sand": ("on sand", "on a sandy floor", "on sandy ground", "over a sand floor", "sandy floor"),
    "slate": ("on slate", "on a slate floor", "on blue-grey ground", "over a slate floor", "slate floor"),
    "sage": ("on a sage floor", "on sage ground", "on grey-green ground", "over a sage floor", "sage floor"),
}
JOINERS: tuple[str, ...] = (" and ", ", ", " while ", ", and ", "; ")
NUMBERS: dict[str, int] = {"a": 1, "an": 1, "the": 1, "one": 1, "1": 1, "two": 2, "2": 2, "three": 3, "3": 3}
NEGATIONS: frozenset[str] = frozenset(["not", "no", "never", "without", "nor", "neither", "none", "cannot", "hardly"])
_SMALL = "a an the and while then again is are it its there scene video clip of with in on at to from as it's slowly"
_VERBS = (
    "move moves moving roll rolls rolling slide slides sliding go goes going come comes coming travel travels head"
    " heads run out left right leftwards leftward rightwards rightward closer nearer forward forwards towards toward"
    " approach approaches approaching camera viewer away distance recede recedes back backward backwards stay stays"
    " staying stand stands standing still rest rests resting remain remains place motionless bounce bounces bouncing"
    " jump jumps jumping fall falls falling drop drops dropping land lands landing hit hits hitting collide collides"
    " colliding bump bumps into crash crashes knock knocks against behind pass passes passing up down"
)
#: All words, besides colours, shapes, sizes and numbers, that a readable prompt may contain.
KNOWN_WORDS: frozenset[str] = frozenset(
    word
    for table in (EVENT_PHRASES, PLACE_PHRASES)
    for phrases in table.values()
    for phrase in phrases
    for word in phrase.replace("{roll}", "").replace("{other}", "").split()
) - NEGATIONS | frozenset(f"{_SMALL} {_VERBS}".split())
