"""The guard of the prompt enhancer: what a rewrite must keep, and what it must not add."""

from __future__ import annotations

import pytest

from postgen.errors import UserError
from postgen.prompt import GuardConfig, Target, check
from postgen.prompt.cleaning import clean
from postgen.prompt.facts import facts_of
from postgen.prompt.styles import STYLES

KEPT = [
    ("a red ball rolls left", "A glossy red ball slowly rolls to the left over short grass."),
    ("two dogs", "2 playful dogs wait on a porch in warm light."),
    ("a pair of gray wolves", "Two grey wolves stand in the snow."),
    ("the ball is red and the cube is blue", "A red ball lies next to a blue cube."),
    ("a red and white flag", "A red and white flag waves in the wind."),
    ("Anna walks to Paris", "Anna walks along a road to Paris at dawn."),
    ("a shop with the sign 'OPEN 24h'", 'A shop at night; its sign says "OPEN 24h" in bright letters.'),
    ("a street without people", "A quiet street without people, early light."),
    ("show me a beautiful video of a cat", "A cat stretches on a window sill."),
    ("one small boat", "A small boat drifts on a lake."),
    ("a dog's tail wags", "The tail of a dog wags quickly from side to side as it is wagging."),
    ("a 3D render of 10 cubes", "A clean 3D render of ten cubes in a row."),
    ("twenty-one birds", "21 birds fly over the sea."),
    ("1,000 lanterns", "A thousand lanterns rise into the sky."),
    ("fifteen people dancing", "15 people dancing in a hall."),
    ("a red-haired woman", "A woman with red hair walks."),
    ("a dark-blue car", "A dark blue car drives along a road."),
    ("a dark blue car", "A dark-blue car drives along a road."),
    ("a well-known actor", "A well known actor smiles at the camera."),
    ("a 21-year-old man", "A 21-year-old man smiles."),
    ("a dog without a collar or leash", "A dog without a leash or a collar runs on grass."),
    ("a horse, not a zebra", "A horse, not a zebra, gallops over a field."),
    ("\U0001f436 on a skateboard", "\U0001f436 on a skateboard rolls down a hill."),
    ("\U0001f680", "\U0001f680 lifts off at dawn."),
    ("a caf\u00e9 in Zurich", "A cafe\u0301 in Zurich with people."),
    ('Tom said "it\'s over"', "Tom said \u201cit\u2019s over\u201d and left."),
    (
        "\u4e00\u53ea\u7ea2\u8272\u7684\u732b",
        "\u4e00\u53ea\u7ea2\u8272\u7684\u732b\u5728\u8349\u5730\u4e0a\u5954\u8dd1\u3002",
    ),
]
REFUSED = [
    ("a red ball", "A ball rolls over the grass.", "red is missing"),
    ("a red ball", "A crimson ball rolls.", "red is missing"),
    ("a red ball and a blue cube", "A blue ball lies beside a red cube.", "red is missing"),
    ("a red ball and a blue cube", "A red ball, a blue cube, and another blue ball.", "blue now belongs"),
    ("two red balls", "Three red balls roll.", "2 is missing"),
    ("a dog", "Three dogs run.", "a single dog is missing"),
    ("a dog", "One dog meets three dog puppets.", "3 now belongs"),
    ("a dog on a beach", "A wide beach at sunset.", "dog is missing"),
    ("a ball rolls left", "A ball rolls to the right.", "left is missing"),
    ("a street without people", "A street with many people.", "without is missing"),
    ("a street with people", "A street with people and no cars.", "it negates something"),
    ("a man walks", "A man is not walking, he walks away.", "it negates something"),
    ("a sign 'STOP'", "A sign 'GO' in the rain.", '"STOP" is missing'),
    ("a sign", 'A sign that says "SALE".', 'it adds the quoted text "SALE"'),
    ("Anna walks", "Hanna walks in a park.", "anna is missing"),
    ("a dog runs", "I'm sorry, but I cannot help with a dog that runs.", "a refusal"),
    ("a dog runs", "A dog runs. The rewritten prompt has more detail.", "speaks about the prompt"),
    ("twenty-one birds", "Twenty birds fly.", "21 is missing"),
    ("thirty people", "Thirteen people dance.", "30 is missing"),
    ("1,000 lanterns", "100 lanterns rise.", "1000 is missing"),
    ("a red-haired woman", "A blonde-haired woman in a red dress.", "red is missing"),
    ("a red-haired woman", "A red woman with long hair.", "red is missing"),
    ("a dark-blue car", "A light blue car drives.", "dark is missing"),
    ("a horse, not a zebra", "A zebra, not a horse, gallops.", "it negates another word"),
    ("a man in a hat without a coat", "A man in a coat without a hat.", "it negates another word"),
    ("\U0001f436 on a skateboard", "A dog on a skateboard.", "\U0001f436 is missing"),
    ("\U0001f534\u26bd rolls", "\u26bd rolls on grass.", "\U0001f534 is missing"),
    ("\u4e00\u53ea\u7ea2\u8272\u7684\u732b", "\u4e00\u53ea\u84dd\u8272\u7684\u732b\u3002", "is missing"),
    ("a dog runs", "A dog runs, see https://example.org", "it has markup: https://"),
    ("a dog runs", "| a | dog |\n|---|---|\n| runs | fast |", "it has markup: |"),
    ("a dog runs", "\\boxed{A dog runs}", "it has markup"),
    ("a dog runs", "", "contains no prompt"),
    ("a dog runs", "<think>a dog runs", "contains no prompt"),
    ("a dog runs", "***", "contains no prompt"),
]


@pytest.mark.parametrize(("original", "answer"), KEPT)
def test_a_faithful_rewrite_passes(original: str, answer: str) -> None:
    verdict = check(original, answer)
    assert verdict.problems == ()
    assert verdict.text == answer


@pytest.mark.parametrize(("original", "answer", "problem"), REFUSED)
def test_an_unfaithful_rewrite_is_refused(original: str, answer: str, problem: str) -> None:
    assert problem in "; ".join(check(original, answer).problems)


@pytest.mark.parametrize("original", [original for original, _ in KEPT])
def test_the_prompt_itself_always_passes(original: str) -> None:
    assert check(original, original, plain=True).ok


def test_words_of_the_user_may_look_like_a_refusal_or_markup() -> None:
    assert check("a robot says I'm sorry", "A robot slowly says I'm sorry.").ok
    assert check("the prompt on a screen", "The prompt blinks on a dark screen.").ok
    assert check("a *bold* idea <3", "a *bold* idea <3 in neon", plain=True).ok


def test_other_languages_must_survive_word_by_word() -> None:
    assert check("ein roter Ball rollt", "ein roter Ball rollt. Soft light.").ok
    assert not check("ein roter Ball rollt", "A red ball rolls.").ok
    assert check("一只猫", "一只猫. Soft light.").ok


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("Sure! Here is the prompt:\n\nA red ball rolls.", "A red ball rolls."),
        ("**Enhanced prompt:** A red ball rolls.\n\nNote: I kept the colour.", "A red ball rolls."),
        ('{"enhanced_prompt": "A red ball rolls."}', "A red ball rolls."),
        ("```\nA red ball rolls.\n```", "A red ball rolls."),
        ("<think>The user wants: a ball.</think>\nA red ball rolls.<|im_end|>", "A red ball rolls."),
        ("\u201cA red ball rolls.\u201d", "A red ball rolls."),
        ("- A red ball\n- rolls.", "A red ball rolls."),
        ("Great white sharks swim.", "Great white sharks swim."),
        ('A sign "OPEN" beside "CLOSED"', 'A sign "OPEN" beside "CLOSED"'),
        ("Here it is:\n\n---\n\nA red ball rolls.\n\n---", "A red ball rolls."),
        ("![ball](http://a/b.png) A [red ball](http://a) rolls.", "A red ball rolls."),
        ("&quot;A red ball rolls.&quot;", "A red ball rolls."),
        ("[INST] a red ball [/INST] A red ball rolls.", "A red ball rolls."),
        ('["A red ball rolls."]', "A red ball rolls."),
        ('{"prompt": {"text": "A red ball rolls."}}', "A red ball rolls."),
        ('{"prompt": ["one", "two"]}', '{"prompt": ["one", "two"]}'),
        ("Enhanced prompt - A red ball rolls.", "A red ball rolls."),
        ("A red ball rolls.\nLet me know if you need more!", "A red ball rolls."),
    ],
)
def test_only_the_prompt_of_an_answer_is_used(answer: str, wanted: str) -> None:
    assert clean(answer) == wanted


def test_a_long_answer_is_cut_at_a_sentence() -> None:
    target = Target(style=STYLES["short"], limit=14)
    verdict = check("a red ball", "A red ball rolls over grass. It is soft light and a wide shot of it.", target)
    assert (verdict.text, verdict.problems) == ("A red ball rolls over grass.", ())
    assert check("a red ball", "A red ball rolls over grass. It is soft li").text == "A red ball rolls over grass."
    late = check("a red ball", "A ball rolls over the short grass in light. It is red.", target)
    assert late.problems == ("red is missing",)
    one = check("a red ball", "A red ball rolls " + "and rolls " * 20, target)
    assert "more than the allowed 14" in one.problems[0]


def test_actions_may_change_if_asked() -> None:
    answer = "A dog is sprinting through a park."
    assert check("a dog runs", answer).problems == ("runs is missing",)
    assert check("a dog runs", answer, config=GuardConfig(keep_actions=False)).ok


def test_facts_of_a_prompt() -> None:
    facts = facts_of("Two small red balls and Anna's green cube, no wind")
    assert [(bond.value, sorted(bond.words)) for bond in facts.bonds] == [
        ("2", ["bal", "smal"]),
        ("red", ["bal"]),
        ("green", ["cub"]),
    ]
    assert (facts.names, facts.negations) == (("Anna",), ("no",))
    assert {"small", "balls", "cube", "wind"} == set(facts.words)


@pytest.mark.parametrize("wrong", [{"least_words": -1}, {"least_words": True}, {"keep_actions": 1}])
def test_wrong_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        GuardConfig(**wrong)  # type: ignore[arg-type]
