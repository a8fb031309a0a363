"""Previews during sampling: the estimate of the clean latents, mapped to colours and shown as a small clip."""

from __future__ import annotations

import base64
import io
import time
from html import escape
from typing import TYPE_CHECKING, Any

from postgen.running import Moment

if TYPE_CHECKING:
    from torch import Tensor

    from postgen.families.latent_colours import LatentColours

MOST_SHARE = 0.03
"""Largest share of the time between two previews that making one may take; slower previews are made less often."""
_MOST_SIDE = 160
"""Longest side of a preview in pixels; the page enlarges the preview."""
_MOST_PICTURES = 12
"""Most frames of a preview; longer clips send every second frame, or fewer."""
_SECONDS = 1.6
"""Seconds that a preview takes to play."""


class Preview:
    """Makes previews of one video during sampling.

    Args:
        pipe: the pipeline that makes the video.
        show: callback that receives the HTML of each preview.
        every: smallest number of steps between two previews.
    """

    def __init__(self, pipe: Any, show: Any, every: int = 2) -> None:
        from postgen.families.latent_colours import latent_colours

        self._colours: LatentColours | None = latent_colours(pipe)
        self._show, self._every = show, every
        self._last: tuple[int, float] = (0, time.perf_counter())
        self._each = 0.0
        self.seconds = 0.0
        """Seconds spent on previews."""

    def look(self, moment: Moment) -> None:
        """Show a preview if one is due; a `look` callback for `postgen.running.Watch`."""
        done, since = self._last
        now = time.perf_counter()
        if moment.done - done < self._every or moment.done == moment.total or self._colours is None:
            return
        if self._each > MOST_SHARE * (now - since):
            return
        clean = moment.clean() if self._colours.fits(moment.latents) else None
        if clean is None:
            return
        self._show(_html(self._colours.clip(clean), moment.done, moment.total))
        self._last = (moment.done, time.perf_counter())
        self._each = self._last[1] - now
        self.seconds += self._each

    def learn(self, latents: Tensor | None, clip: Tensor) -> None:
        """Fit the colours of later previews to a finished video.

        Args:
            latents: the latents of the video; None changes nothing.
            clip: its decoded frames.
        """
        if self._colours is not None and latents is not None and self._colours.fits(latents):
            self._colours.learn(latents, clip)


def _html(clip: Tensor, done: int, total: int) -> str:
    data = base64.b64encode(animated(clip)).decode()
    said = f"Rough preview after step {done} of {total}"
    picture = f'<img alt="{escape(said)}" src="data:image/webp;base64,{data}">'
    return f"<figure>{picture}<figcaption>{escape(said)}</figcaption></figure>"


def animated(clip: Tensor) -> bytes:
    """Return a clip (t, 3, h, w) in [0, 1] as an animated WebP with at most 12 frames of at most 160 x 160 pixels."""
    from PIL import Image

    chosen = clip[:: -(-len(clip) // _MOST_PICTURES)]
    pictures = [Image.fromarray((f.permute(1, 2, 0) * 255).round().byte().numpy()) for f in chosen]
    each = round(1000 * _SECONDS / len(pictures))
    for picture in pictures:
        picture.thumbnail((_MOST_SIDE, _MOST_SIDE))
    file = io.BytesIO()
    pictures[0].save(
        file, "WEBP", save_all=True, append_images=pictures[1:], duration=each, loop=0, quality=80, method=0
    )
    return file.getvalue()
