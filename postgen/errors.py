"""Errors for the user, and the functions that check values and write error messages."""

import difflib
import math
import re
import sys
from collections.abc import Iterable
from typing import cast


class UserError(ValueError):
    """Wrong input. The message is one line: what was given, what is allowed, what to do.

    The command line prints the message, writes no output and exits with code 2.
    """


class SettingError(UserError):
    """Wrong value of one setting. The command line replaces the name of the setting by its option.

    Args:
        setting: name of the setting, such as num_frames.
        text: rest of the message after the name.
        before: beginning of the message before the name.

    >>> str(SettingError("num_frames", " must be above 0, got 0"))
    'num_frames must be above 0, got 0'
    """

    def __init__(self, setting: str, text: str, *, before: str = "") -> None:
        super().__init__(f"{before}{setting}{text}")
        self.setting, self.text, self.before = setting, text, before

    def worded(self, name: str) -> str:
        """Return the message with another name of the setting."""
        return f"{self.before}{name}{self.text}"


_MOST = 80
"""Largest number of characters of a value in a message."""


def shown(value: object) -> str:
    """Return a wrong value as text for an error message: its `repr`, shortened if it is long.

    >>> shown("many"), shown(10**5000), shown("9" * 5000)
    ("'many'", 'a number of 5001 digits', "'999999999999999999999999999999999999999...9999999' (5002 characters)")
    """
    if isinstance(value, int) and value.bit_length() > 1000:
        return f"a number of {math.floor(value.bit_length() * math.log10(2)) + 1} digits"
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # Python cannot print ints of more than 4300 digits, nor very deep nesting
        return f"a {type(value).__name__} that is too large to show"
    return cut(text if "\n" not in text else " ".join(text.split()))


def is_number(value: object) -> bool:
    """Return whether a value is a finite int or float, not a bool, and not too large for a float.

    >>> is_number(1), is_number(True), is_number(math.nan), is_number(10**400)
    (True, False, False, False)
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max  # false for NaN and infinity


def is_whole(value: object, least: int, most: int = 2**31 - 1) -> bool:
    """Return whether a value is an int from `least` to `most`, and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def check_number(name: str, value: object, least: float, most: float = 10**9, *, whole: bool = False) -> None:
    """Check that the value of a setting is a number within a range.

    Args:
        name: name of the setting.
        value: value of any type.
        least: smallest allowed value.
        most: largest allowed value.
        whole: whether the value must be an int.

    Raises:
        SettingError: the value is not a number, or it is outside the range.
    """
    if is_number(value) and (not whole or isinstance(value, int)) and least <= cast(float, value) <= most:
        return
    kind = ", a whole number" if whole else ""
    raise SettingError(name, f" must be at least {least:,} and at most {most:,}{kind}, got {shown(value)}")


def check_text(name: str, text: str) -> None:
    """Check that a text can be encoded as UTF-8.

    A lone surrogate (half of a character) comes from bytes that are not UTF-8, or from an escape sequence of JSON. No
    tokenizer can read it, and no file can store it.

    Args:
        name: name of the text in the error message.
        text: the text.

    Raises:
        UserError: the text contains a lone surrogate.

    >>> check_text("the prompt", "a ball")
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{name} is not UTF-8 text: character {error.start + 1} is {text[error.start]!r}, half of a character;"
            " remove it"
        ) from error


def why_no_pattern(value: object) -> str | None:
    """Return the reason why a value is not a regular expression for names; None if it is one.

    >>> why_no_pattern(r"blocks[.]0[.].*"), why_no_pattern(b"blocks")
    (None, 'a text is needed')
    """
    if not isinstance(value, str):
        return "a text is needed"
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError) as error:
        return first_line(error)
    return None


def cut(text: str, most: int = _MOST) -> str:
    """Return a text; if it is longer than `most` characters, without its middle."""
    if len(text) <= most:
        return text
    return f"{text[: most // 2]}...{text[-most // 10 :]} ({len(text)} characters)"


def cut_words(text: str, most: int = _MOST) -> str:
    """Return a text in one line; of each word longer than `most` characters only the beginning and the end remain."""
    return " ".join(cut(word, most) for word in text.split())


NUMBERS = {"int": "a whole number", "float": "a number"}
"""Types of numbers, in the words of messages."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the part of a message that suggests the known word most similar to `word`; empty if none is similar.

    >>> did_you_mean("step", ["steps", "fps"]), did_you_mean("qqq", ["steps"])
    (" Did you mean 'steps'?", '')
    """
    near = difflib.get_close_matches(word.lower(), list(known), 1)
    return f" Did you mean {near[0]!r}?" if near else ""


def named_error(error: BaseException) -> str:
    """Return the class and the message of an error in one line; for a private class, its first public base class.

    >>> named_error(ValueError("a, and\\n  b"))
    'ValueError: a, and b'
    """
    kind = next(kind.__name__ for kind in type(error).__mro__ if kind.__name__[0] != "_")
    return " ".join(f"{kind}: {error}".split())


def first_line(error: BaseException) -> str:
    """Return the first line of the message of an error, or the name of its class if the message is empty.

    >>> first_line(OSError("no header\\nat byte 0")), first_line(KeyError())
    ('no header', 'KeyError')
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
