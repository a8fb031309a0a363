"""The messages of PyYAML and argparse about a recipe, in words for the author of the recipe."""

from __future__ import annotations

import ast
import re

import yaml

from postgen.errors import NUMBERS

_UNCLOSED = {
    "while parsing a flow sequence": "a bracket [ is not closed",
    "while parsing a flow mapping": "a brace { is not closed",
    "while scanning a quoted scalar": "a quote is not closed",
}
_NO_COLON = (
    "there is a colon where none is allowed: put a text with a colon in quotes, and indent all keys of a part equally"
)


def yaml_problem(error: yaml.YAMLError) -> str:
    """Return where and why a text is not valid YAML: `line 1, column 7: a bracket [ is not closed`."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem is None:
        return " ".join(str(error).replace(' in "<unicode string>",', " at").split())
    mark, problem = error.problem_mark or error.context_mark, error.problem
    if error.context in _UNCLOSED:
        mark, problem = error.context_mark or mark, _UNCLOSED[error.context]
    elif "found character '\\t'" in problem:
        problem = "there is a tab: use spaces, not tabs"
    elif found := re.fullmatch(r"found character (.+) that cannot start any token", problem):
        problem = f"a value cannot begin with {found[1]}: put it in quotes"
    elif problem.startswith("mapping values are not allowed"):
        problem = _NO_COLON
    elif problem.startswith(("expected the node content", "expected <block end>")):
        problem = f"something is missing or indented differently here ({problem})"
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark else problem


def setting_problem(message: str, source: str | None) -> str:
    """Return an error of argparse about a setting as a message.

    Args:
        message: the error, for example "argument --max_steps/--max-steps: invalid int value: 'x'".
        source: name of the recipe if the value comes from it; None if the value comes from the command line.
    """
    if missing := re.fullmatch(r"the following arguments are required: (.*)", message):
        names = [words.partition("/")[0].removeprefix("--") for words in missing[1].split(", ")]
        lines = " and ".join(f"'{name}: VALUE'" for name in names)
        options = " ".join(f"--{name} VALUE" for name in names)
        return f"{source} lacks {' and '.join(names)}: add {lines} to the recipe, or {options} to the command"
    found = re.fullmatch(r"argument --(\w+)(?:/[^:]+)?: (.*)", message, re.DOTALL)
    if found is None:
        return f"{source or 'The command line'}: {message.rstrip('.')}"
    name = f"--{found[1]}" if source is None else f"{source}: {found[1]}"
    return f"{name} {_demand(found[2])}"


def _demand(problem: str) -> str:
    """Return what argparse demands of a value, as the end of a sentence that begins with the name of the setting."""
    if wrong := re.fullmatch(r"invalid (int|float) value: (.*)", problem, re.DOTALL):
        return f"must be {NUMBERS[wrong[1]]}, got {wrong[2]}"
    if wrong := re.match(r"Truthy value expected: got (.*) but expected", problem, re.DOTALL):
        return f"must be true or false, got {wrong[1]!r}"
    if wrong := re.fullmatch(r"invalid choice: (.*) \(choose from (.*)\)", problem, re.DOTALL):
        return f"must be one of {wrong[2]}, got {wrong[1]}"
    if wrong := re.fullmatch(r"expected (one|at least one) argument", problem):
        return f"needs {'a' if wrong[1] == 'one' else 'at least one'} value"
    return f"is wrong: {problem.rstrip('.')}"


def unused_words(error: ValueError) -> str:
    """Return the message for words of the command line that are neither an option nor a value of one."""
    listed = re.search(r"not used by the HfArgumentParser: (\[.*\])", str(error), re.DOTALL)
    if listed is None:
        return str(error)
    words = ast.literal_eval(listed[1])
    return f"{', '.join(map(repr, words))} {'is not an option' if len(words) == 1 else 'are not options'}"
