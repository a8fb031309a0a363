"""Lists on the command line in the spelling of YAML: `--key [0, 3]` for `--key 0 3`."""

from collections.abc import Collection, Sequence

import yaml


def without_brackets(words: Sequence[str], lists: Collection[str]) -> list[str]:
    """Return the words with lists in brackets as their values, one after the other; an empty list stays as it is.

    Args:
        words: of the command line, `--key value ...` or `--key=value`. A shell may have cut a list at its spaces.
        lists: names of the settings that are lists. Values of others, and what is no list of texts and numbers, stay.

    >>> without_brackets(["--range", "[0,", "3]", "--name=[a]"], {"range"})
    ['--range', '0', '3', '--name=[a]']
    """
    found: list[str] = []
    groups: list[list[str]] = []
    for word in words:
        if word.startswith("--") or not groups:
            groups.append([])
        groups[-1].append(word)
    for group in groups:
        name, equals, first = group[0].partition("=")
        values = _values(" ".join([*([first] if equals else []), *group[1:]]))
        if values and name.removeprefix("--").replace("-", "_") in lists:
            found += [name, *values]
        else:
            found += group
    return found


def _values(text: str) -> list[str]:
    """Return the values of a list in brackets; none where it is empty, or no such list."""
    if not (text.startswith("[") and text.endswith("]")):
        return []
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return []
    # YAML reads yes and no as truth values: here they are words, which the caller leaves as they were written.
    plain = isinstance(values, list) and all(type(each) in (str, int, float) for each in values)
    return [str(each) for each in values] if plain else []
