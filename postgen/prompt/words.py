"""English words by their role in a prompt: colours, numbers, negations, and words that a rewrite may drop."""

from __future__ import annotations


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


COLOURS = _words(
    "red green blue yellow orange purple pink brown black white grey gray cyan magenta violet indigo turquoise teal"
    " crimson scarlet maroon burgundy golden gold silver bronze copper beige cream ivory tan khaki olive lime emerald"
    " mint navy azure cobalt lavender lilac mauve amber coral salmon peach rust charcoal blonde rainbow transparent"
    " monochrome"
)
"""Names of colours. A rewrite must keep each colour of a prompt, on the thing that has it."""

NUMBERS = {
    **{"zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7"},
    **{"eight": "8", "nine": "9", "ten": "10"},
    **{"eleven": "11", "twelve": "12", "dozen": "12", "thirteen": "13", "fourteen": "14", "fifteen": "15"},
    **{"sixteen": "16", "seventeen": "17", "eighteen": "18", "nineteen": "19", "twenty": "20", "thirty": "30"},
    **{"forty": "40", "fifty": "50", "sixty": "60", "seventy": "70", "eighty": "80", "ninety": "90"},
    **{"hundred": "100", "thousand": "1000", "million": "1000000"},
    **{"single": "1", "pair": "2", "couple": "2", "both": "2", "half": "1/2"},
}
"""Number words -> digits: `two` and `2` are the same number."""

NEGATIONS = _words("no not never without neither nor none nobody nothing cannot")
"""Words that negate. Words that end in n't are negations too."""

ARTICLES = frozenset(("a", "an", "one", "1", "single"))
"""Words before one thing."""

COPULAS = _words("is are was were be being looks look appears colored coloured painted")
"""Words between a thing and its colour, as in "the ball is red"."""

SMALL = _words(
    "me us the a an this that these those it its it's he she they his her their him them who which there here i you"
    " we my your and or but while as then so if when where than also just only very quite rather really too is are"
    " was were be been being am has have had do does did can could will would should may might must of in on at to"
    " from by for with into onto about within during like"
)
"""Words without a content of their own, which a rewrite may drop."""

VAGUE = _words(
    "video videos clip clips scene footage film movie show shows showing shown depict depicts depicting display make"
    " makes create creates generate generates please want would something some nice beautiful pretty cool amazing"
    " awesome great good stunning gorgeous interesting says saying reads reading"
)
"""Words that say little about the content of a video, which a rewrite may replace by something more exact."""

ACTIONS = _words(
    "move moves moving roll rolls rolling slide slides sliding go goes going come comes coming travel travels run"
    " runs running walk walks walking jump jumps jumping bounce bounces bouncing fall falls falling drop drops"
    " dropping fly flies flying swim swims swimming drive drives driving ride rides riding sit sits sitting stand"
    " stands standing stay stays staying rest rests resting lie lies lying turn turns turning spin spins spinning"
    " rotate rotates rotating dance dances dancing play plays playing eat eats eating drink drinks drinking look looks"
    " looking hold holds holding hit hits hitting collide collides colliding pass passes passing chase chases chasing"
    " climb climbs climbing float floats floating drift drifts drifting flow flows flowing burn burns burning smile"
    " smiles smiling talk talks talking sleep sleeps sleeping open opens opening close closes closing approach"
    " approaches approaching remain remains remaining head heads heading crash crashes bump bumps land lands landing"
)
"""Common verbs of movement and posture. They end the words that a colour or number belongs to."""

MOTION = _words("smooth smoothly slow slowly fast quickly motion movement steady")
"""Words that say how things move."""

CAMERA = _words(
    "camera shot close-up closeup pan pans panning zoom zooms zooming dolly tracking aerial drone handheld lens view"
    " angle orbit orbits orbiting pov fpv bokeh timelapse time-lapse slow-motion"
)
"""Words that say how the camera films."""

LIGHT = _words(
    "light lights lighting lit sunlight sunlit sunset sunrise dawn dusk night nighttime daylight daytime noon"
    " moonlight shadow shadows neon candlelight backlit glow glowing sun sunny dark bright overcast foggy misty"
)
"""Words that say how the scene is lit."""

STYLE = _words(
    "cinematic realistic photorealistic photo anime cartoon animation animated painting watercolor watercolour oil"
    " sketch drawing 3d render rendered cgi pixel documentary vintage retro noir style stylized claymation comic"
    " illustration surreal abstract black-and-white monochrome"
)
"""Words that name the style of the picture."""
