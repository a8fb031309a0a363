"""The facts of a prompt that a rewrite must keep: things, colours, numbers, names, quoted texts, negations.

The facts are found without a language model, by the words of `postgen.prompt.words`. Words of other languages than
English count as content, so they must survive unchanged.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from dataclasses import dataclass

from postgen.prompt.words import (
    ACTIONS,
    ARTICLES,
    CAMERA,
    COLOURS,
    COPULAS,
    NEGATIONS,
    NUMBERS,
    SMALL,
    STYLE,
    VAGUE,
)

_QUOTED = re.compile(r'"([^"\n]+)"|\u201c([^\u201d\n]+)\u201d|\u00ab([^\u00bb\n]+)\u00bb|(?<!\w)\'([^\'\n]+)\'(?!\w)')
_TOKEN = re.compile(r"\d+(?:[.,:/]\d+)*(?![\w])|\w+(?:['\u2019.-]\w+)*|[^\w\s]")
_KINDS = ("colour", "number")
_THOUSANDS = re.compile(r"\d{1,3}(?:,\d{3})+")
_COMPOUND = re.compile(r"(twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety)-(\w+)")
_NO_SYMBOLS = "\u00a9\u00ae\u2122\u00b0"
"""Copyright and trade marks and the degree sign, which are no pictures."""


@dataclass(frozen=True, slots=True)
class Token:
    """One word or punctuation mark of a prompt."""

    text: str
    """As it is written."""
    word: str
    """In lower case, with straight apostrophes; `gray` is `grey`."""
    first: bool
    """Whether it is the first word of a sentence."""
    joined: bool = False
    """Whether a hyphen joins it to the token before: the second part of `red-haired`."""

    @property
    def is_word(self) -> bool:
        """Whether it is a word or a number and not a punctuation mark."""
        return any(map(str.isalnum, self.word))

    @property
    def kind(self) -> str:
        """Return "colour", "number", "negation", "small" (a word without content), "word", or "" for punctuation."""
        word = self.word
        if not self.is_word:
            return ""
        if word in COLOURS or word.removesuffix("ish") in COLOURS:
            return "colour"
        if word in NUMBERS or word[0].isdigit() or _compound(word):
            return "number"
        if word in NEGATIONS or word.endswith("n't"):
            return "negation"
        return "small" if word in SMALL or word in VAGUE else "word"


@dataclass(frozen=True, slots=True)
class Bond:
    """A colour or number and the words that it belongs to."""

    kind: str
    """colour or number."""
    value: str
    """The colour, or the number in digits."""
    words: frozenset[str]
    """Stems of the words that it may belong to; empty if there are none."""


@dataclass(frozen=True, slots=True)
class Facts:
    """The facts of one prompt; see `facts_of`."""

    quotes: tuple[str, ...]
    """Quoted texts, which a video model may render, without their quotation marks."""
    names: tuple[str, ...]
    """Capitalised words inside a sentence, as they are written."""
    words: tuple[str, ...]
    """All other words with content, in lower case: things, their properties, actions, directions."""
    singular: frozenset[str]
    """Words after a, an or one, up to the next small word or verb: a rewrite may not use them in the plural only."""
    bonds: tuple[Bond, ...]
    """Colours and numbers."""
    negations: tuple[str, ...]
    """Negations, in lower case."""
    negated: tuple[frozenset[str], ...] = ()
    """Stems of the words that each negation negates."""
    symbols: tuple[str, ...] = ()
    """Emoji and other pictures of one character."""

    def __len__(self) -> int:
        """Return the number of facts."""
        lists = (self.quotes, self.names, self.words, self.bonds, self.negations, self.symbols)
        return sum(map(len, lists))


def facts_of(prompt: str) -> Facts:
    """Return the facts of a prompt.

    >>> facts = facts_of("Two red balls roll left, and Anna holds a sign 'STOP'")
    >>> facts.quotes, facts.names, [(bond.value, sorted(bond.words)) for bond in facts.bonds]
    (('STOP',), ('Anna',), [('2', ['bal']), ('red', ['bal'])])
    """
    text = unicodedata.normalize("NFC", prompt)
    quotes = tuple(" ".join(next(filter(None, found.groups())).split()) for found in _QUOTED.finditer(text))
    quotes = tuple(quote.replace("\u2019", "'") for quote in quotes)
    rest = _QUOTED.sub(" ; ", text)
    tokens = tokens_of(rest)
    names = [t.text for t in tokens if t.kind == "word" and t.text[0].isupper() and not t.first]
    names = [name.removesuffix("'s").removesuffix("\u2019s") for name in names]
    named = {name.lower() for name in names}
    words = [t.word for t in tokens if t.kind == "word" and t.word not in named]
    singular = {
        token.word
        for place, article in enumerate(tokens)
        if article.word in ARTICLES
        for token in _run(tokens, place + 1)
        if not token.word.endswith("s") and token.kind == "word"
    }
    return Facts(
        quotes=tuple(dict.fromkeys(quotes)),
        names=tuple(dict.fromkeys(names)),
        words=tuple(dict.fromkeys(words)),
        singular=frozenset(singular),
        bonds=_bonds(tokens),
        negations=tuple(dict.fromkeys(t.word for t in tokens if t.kind == "negation")),
        negated=tuple(_negated(tokens, place + 1) for place, token in enumerate(tokens) if token.kind == "negation"),
        symbols=tuple(dict.fromkeys(c for c in rest if unicodedata.category(c) == "So" and c not in _NO_SYMBOLS)),
    )


def tokens_of(text: str) -> list[Token]:
    """Return the words and punctuation marks of a text.

    A word with a hyphen is one token, unless a part of it is a colour or a number: `dark-blue` and `dark blue` are
    the same.
    """
    tokens: list[Token] = []
    first = True
    for found in _TOKEN.finditer(unicodedata.normalize("NFC", text)):
        for number, part in enumerate(_parts(found[0])):
            word = part.lower().replace("\u2019", "'").removesuffix("'s")
            word = word.replace(",", "") if _THOUSANDS.fullmatch(word) else {"gray": "grey"}.get(word, word)
            tokens.append(Token(part, word, first, joined=number > 0))
            first = part in ".!?:;" or (first and not tokens[-1].is_word)
    return tokens


def _parts(text: str) -> list[str]:
    """Return the tokens of a word: the parts of a word with hyphens if one of them is a colour or a number."""
    word = text.lower()
    parts = [part for part in text.split("-") if part]
    whole = len(parts) < 2 or word in CAMERA or word in STYLE or _compound(word)
    return [text] if whole or not any(part.lower() in COLOURS or part.lower() in NUMBERS for part in parts) else parts


def _compound(word: str) -> str:
    """Return the value of a number such as twenty-one in digits; empty for other words."""
    found = _COMPOUND.fullmatch(word)
    value = NUMBERS.get(found[2], "") if found else ""
    return str(int(NUMBERS[found[1]]) + int(value)) if found and value in list("123456789") else ""


def stem(word: str) -> str:
    """Return a crude stem: the same for the forms of a regular noun or verb.

    >>> stem("balls"), stem("rolling"), stem("rolls"), stem("ponies"), stem("pony")
    ('bal', 'rol', 'rol', 'pon', 'pon')
    """
    for ending in ("ies", "ied", "ing", "es", "ed", "s", "e", "y"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word[: -len(ending)]
            break
    return word[:-1] if len(word) > 3 and word[-1] == word[-2] else word


def value_of(token: Token) -> str:
    """Return the value of a colour or number: two, 2 and a pair are the same."""
    return NUMBERS.get(token.word) or _compound(token.word) or token.word


def bonds_of(text: str) -> tuple[Bond, ...]:
    """Return the colours and numbers of a text with all words that each may belong to."""
    return _bonds(tokens_of(_QUOTED.sub(" ; ", text)))


def _bonds(tokens: list[Token]) -> tuple[Bond, ...]:
    found = []
    for place, token in enumerate(tokens):
        if token.kind in _KINDS:
            after = tokens[place + 1 : place + 2]
            # The woman of "a red-haired woman" is not red.
            run = after if after and after[0].joined and after[0].kind == "word" else _run(tokens, place + 1)
            words = frozenset(stem(each.word) for each in run if each.kind == "word")
            found.append((token.kind, value_of(token), words or _before(tokens, place)))
    return tuple(Bond(*bond) for bond in _told_apart(found))


def _run(tokens: list[Token], place: int) -> list[Token]:
    """Return the words with content from a place on, up to the next verb, small word or punctuation mark.

    Colours and numbers in between, also joined by `and`, do not end the run: the ball of "a red and blue ball" is red.
    """
    run: list[Token] = []
    while place < len(tokens):
        token = tokens[place]
        after = tokens[place + 1].kind if place + 1 < len(tokens) else ""
        joins = not run and token.word in ("and", "or", ",", "-") and after in _KINDS
        if token.kind == "word" and (token.word not in ACTIONS or not run):
            run.append(token)
        elif token.kind not in _KINDS and not joins:
            break
        place += 1
    return run


def _negated(tokens: list[Token], place: int) -> frozenset[str]:
    """Return the stems of the words after a negation, up to the next verb, small word or punctuation mark."""
    found: list[str] = []
    for token in tokens[place:]:
        if token.kind == "word" and not (found and token.word in ACTIONS):
            found.append(stem(token.word))
        elif token.kind in _KINDS:
            found.append(value_of(token))
        elif token.kind != "small" or (found and token.word not in ("a", "an", "the", "or")):
            break
    return frozenset(found)


def _before(tokens: list[Token], place: int) -> frozenset[str]:
    """Return the stems of the thing before a copula: the ball of "the ball is red"."""
    place -= 1
    while place >= 0 and (tokens[place].kind in _KINDS or tokens[place].word in ("and", ",")):
        place -= 1
    if place < 1 or tokens[place].word not in COPULAS:
        return frozenset()
    words = []
    for token in reversed(tokens[:place]):
        if token.kind != "word":
            break
        words.append(stem(token.word))
    return frozenset(words)


def _told_apart(bonds: list[tuple[str, str, frozenset[str]]]) -> list[tuple[str, str, frozenset[str]]]:
    """Leave out the words that belong to several values of a kind, such as a verb that two things share."""
    owners: dict[tuple[str, str], set[str]] = defaultdict(set)
    for kind, value, words in bonds:
        for word in words:
            owners[kind, word].add(value)
    return [
        (kind, value, frozenset(word for word in words if len(owners[kind, word]) == 1) or words)
        for kind, value, words in bonds
    ]
