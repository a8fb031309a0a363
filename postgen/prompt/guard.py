"""The guard: an enhanced prompt must keep the facts of the user's prompt, and must be a prompt and nothing else."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, fields

from postgen.errors import UserError, is_number, shown
from postgen.prompt.cleaning import clean, is_meta, is_refusal
from postgen.prompt.facts import Bond, Facts, bonds_of, facts_of, stem, tokens_of
from postgen.prompt.target import Target
from postgen.prompt.words import ACTIONS

_SENTENCE = re.compile(r"(?<=[.!?])\s+")
_MARKUP = re.compile(r"https?://|www\.|\]\(|\\\w+\{|[{}|]")
"""What no prompt has: addresses, links, formulas, JSON, tables."""
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
"""Characters of scripts that write no spaces between words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardConfig:
    """Settings of the guard."""

    keep_actions: bool = True
    """Whether common verbs of movement must survive too. Things, colours, numbers, names, quoted texts, directions and
    negations must always survive."""
    own_facts: bool = True
    """Whether to refuse what contradicts the prompt: another colour or number for one of its things, a negation or a
    quoted text that it does not have."""
    least_words: int = 1
    """Smallest number of words of an enhanced prompt."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name == "least_words":
                if not is_number(value) or value != int(value) or not 0 <= value <= 1000:
                    raise UserError(f"least_words must be a whole number from 0 to 1000, got {shown(value)}")
            elif not isinstance(value, bool):
                raise UserError(f"{item.name} must be True or False, got {shown(value)}")


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of the guard for one answer."""

    text: str
    """The prompt in the answer, cut to the allowed length at the end of a sentence."""
    problems: tuple[str, ...]
    """Reasons why it must not be used; empty: it may be used."""

    @property
    def ok(self) -> bool:
        """Whether the text may be used."""
        return not self.problems


def check(
    original: str,
    answer: str,
    target: Target | None = None,
    config: GuardConfig | None = None,
    *,
    plain: bool = False,
) -> Verdict:
    """Check an enhanced prompt against the prompt of the user.

    Args:
        original: prompt of the user.
        answer: raw answer of a language model, or an enhanced prompt.
        target: the video model, for the length and the words that it knows; None: a model of unknown length.
        config: settings.
        plain: whether the answer is a prompt and nothing else, so that nothing is removed from it.

    >>> check("a red ball", "A ball rolls over the grass.").problems
    ('red is missing',)
    >>> check("a red ball", 'Sure: "A shiny red ball rolls."').text
    'A shiny red ball rolls.'
    """
    target, config = target or Target(), config or GuardConfig()
    text = " ".join(answer.split()) if plain else fitted(clean(answer), target)
    if not any(map(str.isalnum, text)) and not facts_of(text).symbols:
        return Verdict("", ("the answer contains no prompt",))
    problems = []
    if is_refusal(text) and not is_refusal(original):
        problems.append("the answer is a refusal or speaks of the language model")
    if is_meta(text) and not is_meta(original):
        problems.append("the answer speaks about the prompt")
    if marks := [mark for mark in _MARKUP.findall(text) if mark not in original]:
        problems.append(f"it has markup: {marks[0]}")
    facts = facts_of(original)
    problems += [f"{fact} is missing" for fact in missing(facts, text, keep_actions=config.keep_actions)]
    if config.own_facts:
        problems += contradictions(facts, text)
    if len(text.split()) < config.least_words:
        problems.append(f"it has fewer than {config.least_words} words")
    if (count := target.count(text)) > max(target.most_tokens, target.count(original)):
        problems.append(f"it has {count} tokens, more than the allowed {target.most_tokens}")
    known = target.unknown(original)
    if unknown := [word for word in target.unknown(text) if word not in known]:
        problems.append(f"the model does not know: {', '.join(unknown)}")
    return Verdict(text, tuple(problems))


def fitted(text: str, target: Target) -> str:
    """Return a text without the last sentences that exceed the length of a target, or that are cut off.

    A text of one sentence that is too long is returned unchanged.
    """
    sentences = sentences_of(text)
    if len(sentences) > 1 and sentences[-1][-1:] not in ".!?\"\u201d\u2019')":
        sentences.pop()  # the language model reached its largest number of tokens
    while len(sentences) > 1 and target.count(" ".join(sentences)) > target.most_tokens:
        sentences.pop()
    return " ".join(sentences)


def sentences_of(text: str) -> list[str]:
    """Return the sentences of a text.

    >>> sentences_of("A dog runs. It barks!")
    ['A dog runs.', 'It barks!']
    """
    return _SENTENCE.split(text.strip())


def missing(facts: Facts, text: str, *, keep_actions: bool = True) -> list[str]:
    """Return the facts that a text does not keep, as they appear in the prompt.

    Regular forms of a word are the same (`ball` and `balls`, `roll` and `rolling`), except that a single thing must
    stay single.

    Args:
        facts: facts of the user's prompt.
        text: the enhanced prompt.
        keep_actions: whether common verbs of movement must survive.
    """
    exact = _words_in(text)
    stems = {stem(word) for word in exact}
    plain = " ".join(unicodedata.normalize("NFC", text).split()).replace("\u2019", "'")
    lost = [f'"{quote}"' for quote in facts.quotes if quote.replace("\u2019", "'") not in plain]
    lost += [name for name in facts.names if name.lower().removesuffix("'s") not in exact]
    for word in facts.words:
        if (word in ACTIONS and not keep_actions) or word in exact:
            continue
        parts = [part for part in word.split("-") if part]
        whole = word.replace("-", "") in exact or (_UNSPACED.search(word) and word in plain.lower())
        if not whole and not all(stem(part) in stems for part in parts):
            lost.append(word)
        elif word in facts.singular and _plural_only(word, exact):
            lost.append(f"a single {word}")
    there = bonds_of(text)
    counted = [bond for bond in facts.bonds if (bond.kind, bond.value) != ("number", "1")]  # "a" is as good as "one"
    lost += list(dict.fromkeys(bond.value for bond in counted if not any(_keeps(bond, each) for each in there)))
    lost += [symbol for symbol in facts.symbols if symbol not in text]
    return lost + [word for word in facts.negations if word not in exact]


def contradictions(facts: Facts, text: str) -> list[str]:
    """Return what a text says against the facts of a prompt: other colours and numbers, negations, quoted texts."""
    told = facts_of(text)
    found = []
    owners: dict[tuple[str, str], set[str]] = {}
    for bond in facts.bonds:
        for word in bond.words:
            owners.setdefault((bond.kind, word), set()).add(bond.value)
    for word in facts.singular:
        owners.setdefault(("number", stem(word)), {"1"})
    for bond in told.bonds:
        for word in sorted(bond.words):
            if bond.value not in owners.get((bond.kind, word), {bond.value}):
                found.append(f"{bond.value} now belongs to another word")
                break
    if facts.negations != told.negations and set(told.negations) - set(facts.negations):
        found.append("it negates something that the prompt does not negate")
    found += _negates_others(facts, told)
    if added := [quote for quote in told.quotes if quote not in facts.quotes]:
        found.append(f'it adds the quoted text "{added[0]}"')
    return list(dict.fromkeys(found))


def _negates_others(facts: Facts, told: Facts) -> list[str]:
    """Return what a text negates instead of what the prompt negates: "a zebra, not a horse" for the opposite."""
    denied = frozenset().union(*facts.negated)
    shown_words = {stem(word) for word in facts.words} - denied
    wrong = sorted(shown_words & frozenset().union(*told.negated))
    moved = any(group and not any(group & other for other in told.negated) for group in facts.negated)
    return ["it negates another word"] if wrong or (moved and any(told.negated)) else []


def _words_in(text: str) -> set[str]:
    """Return the words of a text, and the parts of words with hyphens."""
    words = {token.word for token in tokens_of(text) if token.is_word}
    return words | {part for word in words if "-" in word for part in word.split("-") if part}


def _plural_only(word: str, exact: set[str]) -> bool:
    plurals = {f"{word}s", f"{word}es", f"{word[:-1]}ies"}
    return bool(plurals & exact) and word not in exact


def _keeps(bond: Bond, other: Bond) -> bool:
    if (bond.kind, bond.value) != (other.kind, other.value):
        return False
    return not bond.words or bool(bond.words & other.words)
