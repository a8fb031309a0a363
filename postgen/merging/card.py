"""The model card of a merge: it begins with the merge, and its old part shows no pictures of the first source."""

from __future__ import annotations

import json
import re

from .report import MergeReport

_FRONT = re.compile(r"---\n.*?\n---\n\n?", re.DOTALL)
"""The YAML block at the beginning of a model card."""
_LOCAL = r"(?!\s*(?:https?:|data:|//))"
_PICTURE = re.compile(rf"!\[([^\]]*)\]\({_LOCAL}[^)]*\)")
_TAG = re.compile(rf"<(?:img|video|source)\b[^>]*\bsrc=[\"']?{_LOCAL}[^>]*>", re.IGNORECASE)


def merged_card(old: str, report: MergeReport) -> str:
    """Return the card of a merge: the merge, and then the card of the first source without its own pictures.

    Args:
        old: text of the first source's card.
        report: report of the merge.
    """
    titles, *rows = report.rows()
    lines = [titles, tuple("---" for _ in titles), *rows]
    table = "\n".join(f"| {' | '.join(row)} |" for row in lines)
    about = (
        f"## Merge\n\nThese weights are a merge with the settings {json.dumps(dict(report.settings))}:\n\n{table}\n\n"
    )
    about += (
        "The rest of this card, with its numbers, is about the first source alone, which may be better or worse than"
        " the merge. Its pictures are left out.\n\n"
    )
    head = found[0] if (found := _FRONT.match(old)) else ""
    rest = old[len(head) :].lstrip()
    rest = _PICTURE.sub(lambda match: f"*(picture of the first source, left out: {match[1] or 'no title'})*", rest)
    rest = _TAG.sub("*(picture of the first source, left out)*", rest)
    return f"{head}{about}{rest}"
