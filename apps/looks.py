"""Appearance of the page: colours, fonts and spacing. The page loads nothing from other servers."""

from __future__ import annotations

from typing import Any

from postgen.apps.players import CSS as PLAYERS

_SANS = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif")
_MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "Liberation Mono", "monospace")

CSS = """
.gradio-container { width: 100%; max-width: 1180px !important; margin: 0 auto !important; }
#page-head { padding: 4px 0 0; }
#page-head h1 { font-size: 1.5rem; font-weight: 650; margin: 0; letter-spacing: -0.01em; }
#page-head p { margin: 2px 0 0; color: var(--body-text-color-subdued); }
:is(#make, .make) { display: grid; grid-template-columns: minmax(0, 5fr) minmax(0, 6fr); gap: 16px;
  grid-template-areas: "ask made" "settings made"; grid-template-rows: auto 1fr; }
:is(#ask, .ask) { grid-area: ask; }
:is(#made, .made) { grid-area: made; }
:is(#settings, .settings) { grid-area: settings; }
:is(#make, .make) > .column { min-width: 0 !important; width: auto; }
.buttons { gap: 8px; flex-wrap: nowrap !important; }
.buttons button { white-space: nowrap; padding-left: 8px; padding-right: 8px; font-size: 0.95rem; min-height: 40px; }
#history .grid-container { grid-template-columns: repeat(auto-fill, minmax(110px, 1fr)) !important; gap: 8px; }
.numbers .form { display: grid !important; grid-template-columns: repeat(3, minmax(0, 1fr));
  background: var(--block-background-fill); }
.buttons button { flex: 1 1 auto !important; }
#history, #history .gallery-container, #history .grid-wrap { height: auto !important; min-height: 0 !important; }
#history .grid-wrap { max-height: 460px; }
#history .caption-label { font-size: 0.75rem; }
.heading h2 { font-size: 1rem; font-weight: 600; margin: 8px 0 0; }
#randomise { display: flex; align-items: center; }
.job { display: flex; flex-direction: column; gap: 6px; min-height: 44px; font-variant-numeric: tabular-nums; }
.job .line { display: flex; justify-content: space-between; gap: 12px; flex-wrap: wrap; }
.job .line span:last-child { color: var(--body-text-color-subdued); }
.job .bar { height: 6px; border-radius: 3px; background: var(--border-color-primary); overflow: hidden; }
.job .bar div { height: 100%; background: var(--color-accent); transition: width 0.3s linear; }
.job .note { margin: 0; font-size: 0.875rem; color: var(--body-text-color-subdued); }
.job.failed .line span:first-child { color: var(--error-text-color, #b91c1c); }
#preview figure { margin: 0; display: flex; gap: 12px; align-items: center; flex-wrap: wrap; }
#preview img { width: 160px; border-radius: var(--radius-md); }
#preview figcaption, .about-facts { color: var(--body-text-color-subdued); font-size: 0.875rem; }
.about-prompt { margin: 0 0 2px; font-weight: 550; overflow-wrap: anywhere; }
.about-facts { margin: 0; display: flex; flex-wrap: wrap; gap: 2px 16px; }
.beside { align-items: center; }
.beside button { min-height: 44px; }
.measured { border-collapse: collapse; margin: 10px 0 4px; font-variant-numeric: tabular-nums; }
.measured th, .measured td { padding: 4px 20px 4px 0; text-align: left; font-weight: 400; }
.measured thead th, .measured tbody th { color: var(--body-text-color-subdued); font-size: 0.875rem; }
.measured td { white-space: nowrap; }
.measured tr + tr > *, .measured tbody tr > * { border-top: 1px solid var(--border-color-primary); }
.plots { display: grid !important; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr));
  gap: 12px; }
.plots .block, .plots .column { min-width: 0 !important; }
table.plain { border-collapse: collapse; width: 100%; margin: 4px 0; font-variant-numeric: tabular-nums; border: 0; }
table.plain th, table.plain td { padding: 6px 12px 6px 0 !important; border: 0 !important; text-align: left;
  border-bottom: 1px solid var(--border-color-primary) !important; vertical-align: top; }
table.plain tr, table.plain tbody { border: 0 !important; }
table.plain td.number .note { white-space: normal; max-width: 9.5em; margin-left: auto; }
.keys { display: flex; flex-wrap: wrap; gap: 2px 12px; margin: 4px 0 0; font-size: 0.8125rem; }
.keys i { display: inline-block; width: 12px; height: 3px; margin-right: 5px; vertical-align: middle; }
.plots { align-items: stretch !important; }
.plots > .column { justify-content: space-between; }
.plot-head h3 { margin: 0; font-size: 1rem; }
table.plain th { font-weight: 600; color: var(--body-text-color-subdued); }
table.plain th.number, table.plain td.number { text-align: right; white-space: nowrap; padding-right: 0 !important; }
table.plain td.mark { width: 1.6em; font-weight: 700; }
.right { color: #15803d; }
.dark .right { color: #4ade80; }
.wrong { color: var(--error-text-color, #b91c1c); }
.note { color: var(--body-text-color-subdued); font-size: 0.875rem; margin: 2px 0 0; overflow-wrap: anywhere; }
.warned { margin: 4px 0 0; padding-left: 18px; overflow-wrap: anywhere; }
#run-status .job { margin-bottom: 8px; min-height: 0; }
#sample-steps .grid-container { grid-template-columns: none !important; grid-auto-flow: column;
  grid-auto-columns: minmax(260px, 420px); overflow-x: auto; }
#sample-steps .grid-wrap { min-height: 0 !important; }
#history .caption-label { left: 0; right: 0; bottom: 0; max-width: none; text-align: left; border-radius: 0; }
:is(button, a, input, select, textarea, [tabindex]):focus-visible {
  outline: 2px solid var(--color-accent) !important; outline-offset: 2px; }
:is(#settings, .settings) .block { overflow-wrap: anywhere; }
button.label-wrap { text-align: left; gap: 8px; }
input[role="combobox"] { text-overflow: ellipsis; padding-right: var(--size-6) !important; }
footer .divider { display: none; }
@media (max-width: 820px) {
  :is(#make, .make) { grid-template-columns: minmax(0, 1fr); grid-template-areas: "ask" "made" "settings"; }
}
@media (max-width: 640px) {
  .buttons button { font-size: 0.85rem; padding-left: 4px; padding-right: 4px; min-width: 0 !important; }
  .results-buttons { display: grid !important; grid-template-columns: 1fr 1fr; }
  .gradio-container { padding: 8px !important; }
  #page-head h1 { font-size: 1.25rem; }
  .measured th, .measured td { padding-right: 10px; }
}
"""

_DARK = "() => document.body.classList.toggle('dark', {})"


def theme() -> Any:
    """Return the Gradio theme: neutral greys, one accent colour, fonts of the user's system."""
    import gradio as gr

    return gr.themes.Base(
        primary_hue=gr.themes.colors.indigo,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_md,
        font=_SANS,
        font_mono=_MONO,
    ).set(
        body_background_fill="*neutral_50",
        block_border_width="1px",
        block_shadow="none",
        body_text_color_subdued="*neutral_500",  # the next lighter grey has a contrast below 4.5:1
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_text_color="white",
    )


def launch_looks(colours: str) -> dict[str, Any]:
    """Return the arguments of `gr.Blocks.launch` for the appearance.

    Args:
        colours: colour scheme, one of `postgen.apps.settings.THEMES`.
    """
    looks: dict[str, Any] = {"theme": theme(), "css": CSS + PLAYERS, "footer_links": ["api"]}
    if colours != "system":
        looks["js"] = _DARK.format("true" if colours == "dark" else "false")
    return looks
