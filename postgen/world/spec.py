"""What a clip of the synthetic world shows: bodies, events, camera, light. Plain data, no tensors.

World axes: x points to the right of the camera at frame 0, y away from it, z up. Lengths in metres, time in seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from postgen.errors import UserError

#: Albedo of the eight named colours, RGB in [0,1] as displayed, without conversion to linear light. They are
#: saturated, everything else is nearly grey.
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.10, 0.10),
    "orange": (0.98, 0.50, 0.05),
    "yellow": (0.96, 0.88, 0.10),
    "green": (0.12, 0.70, 0.15),
    "cyan": (0.10, 0.82, 0.85),
    "blue": (0.12, 0.25, 0.92),
    "purple": (0.52, 0.14, 0.80),
    "pink": (0.98, 0.30, 0.66),
}
SHAPES: tuple[str, ...] = ("ball", "cube", "cylinder")
#: Radius of the ball, and of the contact circle of the other solids, in metres.
SIZES: dict[str, float] = {"small": 0.45, "medium": 0.6, "large": 0.8}
EVENTS: tuple[str, ...] = (
    "moves left",
    "moves right",
    "moves closer",
    "moves away",
    "stays",
    "bounces",
    "falls",
    "collides",
    "passes behind",
)
#: Events of a body with a second body, its partner; the partner has the event "stays".
PAIR_EVENTS: tuple[str, ...] = ("collides", "passes behind")
PLACES: tuple[str, ...] = ("left", "middle", "right")
PLACE_BORDER = 0.75
"""Distance in metres from the middle at which the places left and right begin."""
CAMERAS: tuple[str, ...] = (
    "static",
    "pan left",
    "pan right",
    "orbit left",
    "orbit right",
    "dolly in",
    "dolly out",
    "dolly return",
)
#: Floor albedo of each background; saturation is at most 0.2, so saturation separates bodies from the floor.
BACKGROUNDS: dict[str, tuple[float, float, float]] = {
    "grey": (0.62, 0.62, 0.63),
    "sand": (0.68, 0.64, 0.57),
    "slate": (0.48, 0.52, 0.56),
    "sage": (0.56, 0.61, 0.56),
}
FPS = 8

Split = Literal["train", "held_out", "all"]


def is_held_out(colour: str, shape: str, event: str) -> bool:
    """Return whether a (colour, shape, event) is held out of training.

    For each (shape, event) one colour is held out, so training still contains every word.

    Args:
        colour, shape, event: names from `COLOURS`, `SHAPES`, `EVENTS`.
    """
    index = list(COLOURS).index(colour) + 2 * SHAPES.index(shape) + 3 * EVENTS.index(event)
    return index % len(COLOURS) == 0


def _check(kind: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"Unknown {kind} {value!r}. Known: {', '.join(allowed)}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Body:
    """One solid with its event.

    Raises:
        UserError: an unknown colour, shape, size or event, a restitution outside [0,1], or a partner that does not
            match the event.
    """

    colour: str
    shape: str
    size: str = "medium"
    event: str = "stays"
    #: Index of the second body of an event in `PAIR_EVENTS`.
    partner: int | None = None
    #: Centre at frame 0 in metres, velocity in m/s, rotation about z in radians.
    position: tuple[float, float, float] = (0.0, 0.0, 0.6)
    velocity: tuple[float, float, float] = (0.0, 0.0, 0.0)
    yaw: float = 0.0
    #: Share of the vertical speed that the body keeps at the floor, in [0,1]; with at most 0.5 the body lands and
    #: rests.
    restitution: float = 0.0

    def __post_init__(self) -> None:
        _check("colour", self.colour, tuple(COLOURS))
        _check("shape", self.shape, SHAPES)
        _check("size", self.size, tuple(SIZES))
        _check("event", self.event, EVENTS)
        if not 0 <= self.restitution <= 1:
            raise UserError(f"restitution is {self.restitution}: it must be in [0, 1].")
        if (self.partner is not None) != (self.event in PAIR_EVENTS):
            raise UserError(
                f"Event {self.event!r} with partner {self.partner!r}: exactly the events {PAIR_EVENTS} need a partner."
            )

    @property
    def radius(self) -> float:
        """Radius of the contact circle in metres."""
        return SIZES[self.size]

    @property
    def half_height(self) -> float:
        """Height of the centre in metres above the floor, for a body that rests on it."""
        return self.radius * HALF_HEIGHT[self.shape]

    @property
    def place(self) -> str:
        """Place of the body at frame 0, as the camera at frame 0 sees it: left, middle or right."""
        x = self.position[0]
        return "left" if x < -PLACE_BORDER else "right" if x > PLACE_BORDER else "middle"


#: Half height of each solid in radii; below, half width in radii (half an edge of the cube, radius of the cylinder).
HALF_HEIGHT = {"ball": 1.0, "cube": 0.85, "cylinder": 1.2}
HALF_WIDTH = {"ball": 1.0, "cube": 0.85, "cylinder": 0.68}


@dataclass(frozen=True, kw_only=True, slots=True)
class Spec:
    """A whole scene. It determines every pixel of a clip of any length.

    Raises:
        UserError: no body, more than four bodies, an unknown camera or background, a partner that does not exist, a
            length or frame rate below 1, or a `camera_turn` or `camera_start` that the camera cannot have.
    """

    bodies: tuple[Body, ...]
    camera: str = "static"
    #: Camera motion within `num_frames` (or `camera_turn`): radians for pan and orbit, a factor of the distance for
    #: dolly.
    camera_amount: float = 0.0
    background: str = "grey"
    #: Direction to the light: azimuth and elevation in radians.
    light: tuple[float, float] = (-0.9, 0.95)
    #: Phases of the floor's low-frequency pattern, in radians.
    floor_phase: tuple[float, float] = (0.0, 0.0)
    #: Planned length of the motion; a clip may be longer (bodies turn around at walls, the camera returns).
    num_frames: int = 17
    fps: int = FPS
    #: Frames from one end of the camera's path to the other, for scenes of any length: the camera moves to and fro,
    #: and poses recur bit for bit. None: `num_frames` - 1, and poses recur only up to rounding.
    camera_turn: int | None = None
    #: Number of frames of its path that the camera has passed at frame 0; needs `camera_turn`.
    camera_start: int = 0

    def __post_init__(self) -> None:
        if not 1 <= len(self.bodies) <= 4:
            raise UserError(f"A spec has 1 to 4 bodies, not {len(self.bodies)}.")
        if self.fps < 1 or self.num_frames < 1:
            raise UserError(f"fps={self.fps}, num_frames={self.num_frames}: both must be at least 1.")
        _check("camera", self.camera, CAMERAS)
        self._check_turn()
        _check("background", self.background, tuple(BACKGROUNDS))
        for index, body in enumerate(self.bodies):
            if body.partner is not None and (body.partner == index or not 0 <= body.partner < len(self.bodies)):
                raise UserError(
                    f"Body {index} has partner {body.partner}, but the bodies are 0..{len(self.bodies) - 1}."
                )

    def _check_turn(self) -> None:
        if self.camera_turn is None and self.camera_start:
            raise UserError(f"camera_start={self.camera_start} without camera_turn: give both or neither.")
        if self.camera_turn is None:
            return
        if (
            not (isinstance(self.camera_turn, int) and isinstance(self.camera_start, int))
            or min(self.camera_turn - 1, self.camera_start) < 0
        ):
            raise UserError(
                f"camera_turn={self.camera_turn}, camera_start={self.camera_start}: give whole frames, at least 1"
                " and at least 0."
            )
        if self.camera in ("static", "dolly return"):
            raise UserError(
                f"Camera {self.camera!r} with camera_turn={self.camera_turn}: only pan, orbit, dolly in and dolly out"
                " allow camera_turn."
            )

    @property
    def held_out(self) -> bool:
        """Whether at least one body is a held-out (colour, shape, event)."""
        return any(is_held_out(b.colour, b.shape, b.event) for b in self.bodies)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Spec:
        """Read the JSON form of `to_dict`.

        Raises:
            UserError: unknown or missing keys, or values that a spec cannot have.
        """
        try:
            bodies = tuple(
                Body(**{**b, "position": tuple(b["position"]), "velocity": tuple(b["velocity"])})
                for b in data["bodies"]
            )
            rest: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k != "bodies"
            }
            return cls(bodies=bodies, **rest)
        except (KeyError, TypeError) as error:
            raise UserError(f"Not a world spec: {error}. Write one with Spec.to_dict().") from None
