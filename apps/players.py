"""Files of results on the page: synchronised video players with one set of controls, and download links."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

CSS = """
.players { display: flex; flex-direction: column; gap: 8px; }
.players .videos { display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: 10px;
  align-items: end; }
.players figure { margin: 0; min-width: 0; display: flex; flex-direction: column; gap: 4px; }
.players figcaption { font-size: 0.875rem; color: var(--body-text-color-subdued); overflow-wrap: anywhere; }
.players video { width: 100%; max-height: 62vh; border-radius: var(--radius-md); display: block; }
.players .bar { display: flex; align-items: center; gap: 8px; font-variant-numeric: tabular-nums; }
.players .bar button {
  min-width: 40px; height: 36px; padding: 0 8px; border-radius: var(--radius-md); line-height: 1;
  border: 1px solid var(--border-color-primary); background: var(--button-secondary-background-fill);
  color: var(--body-text-color); cursor: pointer;
}
.players .bar .play { min-width: 68px; }
.players .bar input { flex: 1; min-width: 60px; accent-color: var(--color-accent); }
.downloads { display: grid; grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)); gap: 2px 16px; margin: 0; }
.downloads a { display: flex; justify-content: space-between; gap: 8px; padding: 6px 2px; }
.downloads a { color: var(--link-text-color); }
.downloads a span { color: var(--body-text-color-subdued); white-space: nowrap; }
.players .bar output { font-size: 0.875rem; color: var(--body-text-color-subdued); white-space: nowrap; }
@media (max-width: 640px) {
  .players .bar { flex-wrap: wrap; }
  .players .bar input { flex-basis: 100%; order: -1; }
  .players .bar output { margin-left: auto; }
}
"""

# Media events do not bubble, so the listeners are on the root element and use the capture phase. Gradio replaces the
# HTML inside with every new value, so the script looks elements up each time.
JS = """
const all = () => [...element.querySelectorAll('.players video')];
const length = (v) => Number.isFinite(v.duration) ? v.duration : 0;
const leader = () => all().reduce((a, b) => (length(b) > length(a) + 0.001 ? b : a));
const root = () => element.querySelector('.players');
const step = () => 1 / (parseFloat(root().dataset.fps) || 8);
let kept = {key: null, time: 0}, wanted = true;
const draw = () => {
  if (!root()) return;
  const lead = leader(), end = length(lead), seek = root().querySelector('input');
  seek.max = end; seek.value = lead.currentTime;
  root().querySelector('output').textContent = `${lead.currentTime.toFixed(1)} / ${end.toFixed(1)} s`;
  const play = root().querySelector('.play');
  play.textContent = lead.paused ? 'Play' : 'Pause';
  kept = {key: root().dataset.key, time: lead.currentTime};
};
const at = (time) => all().forEach((v) => { v.currentTime = Math.max(0, Math.min(time, length(v) - 0.001)); });
const play = () => {
  wanted = true;
  at(leader().currentTime);
  all().forEach((v) => v.play().catch(() => {}));
};
const pause = () => { wanted = false; all().forEach((v) => v.pause()); at(leader().currentTime); };
const tick = () => {
  if (!root() || leader().paused) return;
  const time = leader().currentTime;
  all().forEach((v) => {
    if (v !== leader() && Math.abs(v.currentTime - Math.min(time, length(v))) > 0.08) v.currentTime = time;
  });
  draw();
  requestAnimationFrame(tick);
};
const begin = () => {
  if (!root() || all().some((v) => v.readyState < 1)) return;
  const own = {...kept}, same = own.key === root().dataset.key;
  if (root().dataset.begun) return draw();
  root().dataset.begun = '1';
  if (same) at(own.time); else wanted = true;
  if (wanted) play(); else draw();
};
element.addEventListener('loadedmetadata', begin, true);
element.addEventListener('play', () => requestAnimationFrame(tick), true);
element.addEventListener('pause', draw, true);
element.addEventListener('seeked', draw, true);
element.addEventListener('ended', (event) => {
  if (event.target !== leader()) return;
  at(0); play();
}, true);
element.addEventListener('input', (event) => {
  if (event.target.type === 'range') { pause(); at(parseFloat(event.target.value)); }
});
element.addEventListener('click', (event) => {
  const button = event.target.closest('.bar button');
  if (!button) return;
  if (button.classList.contains('play')) return leader().paused ? play() : pause();
  pause(); at(leader().currentTime + (button.classList.contains('next') ? 1 : -1) * step());
});
begin();
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """One video of a group of players."""

    label: str
    """Caption above the video."""
    path: Path
    """The video file in the folder of a result."""
    version: int = 0
    """Number that changes with the content of the file; without a change the browser does not read the file again."""


def players(**options: Any) -> Any:
    """Create the component in the open Gradio layout; `shown` returns values for it.

    Args:
        options: arguments of `gr.HTML`, such as `elem_id`.
    """
    import gradio as gr

    return gr.HTML(js_on_load=JS, **options)


def shown(clips: Sequence[Clip], *, fps: float, key: str) -> str:
    """Return HTML with the videos side by side and shared controls: play, single-frame steps and a time bar.

    Args:
        clips: the videos, at least one.
        fps: frames per second, for the single-frame steps.
        key: name of the shown content. New videos under the same key continue at the time of the old ones.
    """
    videos = "".join(
        f'<figure><figcaption>{escape(clip.label)}</figcaption><video muted playsinline preload="auto"'
        f' aria-label="{escape(clip.label)}" src="{escape(address(clip.path))}?v={clip.version}"></video></figure>'
        for clip in clips
    )
    bar = (
        '<div class="bar"><button type="button" class="play">Play</button>'
        '<button type="button" class="back" aria-label="Previous frame">&#8249;</button>'
        '<button type="button" class="next" aria-label="Next frame">&#8250;</button>'
        '<input type="range" min="0" max="1" step="any" value="0" aria-label="Time"><output>0.0 s</output></div>'
    )
    return (
        f'<div class="players" data-fps="{fps:g}" data-key="{escape(key)}"><div class="videos">{videos}</div>'
        f"{bar}</div>"
    )


def downloads(files: Sequence[tuple[str, Path]]) -> str:
    """Return HTML with a download link for each existing file.

    Args:
        files: label and path of each file.
    """
    links = "".join(
        f'<a href="{escape(address(path))}" download="{escape(path.name)}">{escape(what)}'
        f"<span>{_size(path)}</span></a>"
        for what, path in files
        if path.is_file()
    )
    return f'<div class="downloads">{links}</div>'


def _size(path: Path) -> str:
    size = path.stat().st_size
    return f"{size / 2**20:.1f} MB" if size >= 2**20 else f"{max(1, round(size / 1024))} kB"


def address(path: Path) -> str:
    """Return the address of a result's file, relative to the address of the page."""
    return f"gradio_api/file={quote(str(path))}"
