"""Template enhancer, targets, fallback, cache, chat models, and the argument of the drop-in pipelines."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import postgen
from postgen.errors import UserError
from postgen.prompt import (
    ChatRewriter,
    EnhancerConfig,
    PromptCache,
    PromptEnhancer,
    Target,
    check,
    get_rewriter,
    smollm2,
    target_of,
)
from postgen.prompt.calls import by_segment, enhanced_for_call, takes_segments
from postgen.prompt.styles import STYLES, style_for
from postgen.prompt.target import target_for, target_of_model
from postgen.prompt.templates import TemplateRewriter, phrases_of
from postgen.world import parse
from tests.offline_assets import installed
from tests.prompt.tiny_chat import tiny_chat

PROMPTS = [
    "a cat",
    "two red balls on a table",
    "a sign that says 'STOP'",
    "iPhone on a desk, no people",
    "Anna dances at sunset, aerial shot, anime",
    "eine Katze",
]


class Answering:
    """Rewriter with fixed answers, one for each seed."""

    name = "answering"

    def __init__(self, *answers: str) -> None:
        self.answers, self.asked = answers, 0

    def settings(self) -> dict[str, Any]:
        return {"answers": list(self.answers)}

    def __call__(self, prompts: Any, target: Target, seed: int) -> list[str]:
        self.asked += len(prompts)
        return [self.answers[seed % len(self.answers)]] * len(prompts)


@pytest.fixture(scope="module")
def pipe() -> Any:
    from postgen.pipelines import WanPipeline

    loaded = WanPipeline.from_pretrained(postgen.embedded_model())
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.mark.parametrize("style", [name for name in STYLES if name != "world"])
def test_the_template_keeps_everything_and_the_length(style: str) -> None:
    target = Target(style=STYLES[style])
    enhancer = PromptEnhancer(target=target)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = enhancer(PROMPTS)
    assert found == enhancer(PROMPTS) == PromptEnhancer(target=target)(PROMPTS)
    for prompt, text in zip(PROMPTS, found, strict=True):
        assert check(prompt, text, target, plain=True).ok
        assert prompt.lower() in text.lower()
    changed = PromptEnhancer(config=EnhancerConfig(seed=1), target=target)(PROMPTS) != found
    assert changed == (style != "edit")


def test_the_template_leaves_out_what_the_prompt_says() -> None:
    text = PromptEnhancer()(["Anna dances slowly at sunset, aerial shot, anime"])[0]
    assert text == "Anna dances slowly at sunset, aerial shot, anime"


def test_phrases_contradict_no_prompt() -> None:
    from postgen.prompt.facts import facts_of

    for style in STYLES.values():
        for phrase in phrases_of(style):
            facts = facts_of(phrase)
            assert (facts.bonds, facts.negations, facts.quotes, facts.names) == ((), (), (), ()), phrase


def test_a_long_prompt_is_not_changed() -> None:
    long = " ".join(["a red ball rolls over grass and"] * 10)
    assert PromptEnhancer()([long]) == [long]
    short = Target(style=STYLES["prose"], limit=4)
    assert PromptEnhancer(target=short)(["a red ball rolls"]) == ["a red ball rolls"]


def test_styles_and_lengths_of_families(pipe: Any) -> None:
    from diffusers import CogVideoXPipeline, LTXPipeline

    assert [style_for(kind.__name__).name for kind in (CogVideoXPipeline, LTXPipeline)] == ["long", "sequence"]
    target = target_of(pipe)
    assert (target.style.name, target.closed, target.limit) == ("world", True, 512)
    same = target_of_model(str(postgen.embedded_model()), "WanPipeline")
    assert same.settings() == target.settings()
    assert Target().count("a red ball rolls") == 6  # 1.4 tokens per word, rounded up
    processor = SimpleNamespace(tokenizer=pipe.tokenizer)  # as in Kandinsky, a processor of pictures and text
    assert target_for("Kandinsky5T2VPipeline", processor, None).count("a red ball") == target.count("a red ball")


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("red ball moves left", "a red ball moves left"),
        ("golden sphere", "a golden sphere stays still"),
        ("two blue cubes", "two blue cubes"),
        ("orange cube and a cyan ball bounces", "an orange cube stays still and a cyan ball bounces"),
        ("a green cylinder slides right", "a green cylinder slides right"),
    ],
)
def test_the_embedded_model_gets_captions_of_its_world(pipe: Any, prompt: str, wanted: str) -> None:
    enhancer = PromptEnhancer().for_pipeline(pipe)
    text = enhancer([prompt])[0]
    assert text.startswith(f"{wanted}, ")
    assert "camera" in text
    assert target_of(pipe).unknown(text) == target_of(pipe).unknown(prompt)
    before, after = parse(prompt), parse(text)
    assert before is not None
    assert after is not None
    told = [(body.colour, body.shape, body.event) for body in after.bodies]
    assert told == [(body.colour, body.shape, body.event) for body in before.bodies]


def test_a_refused_answer_is_not_used() -> None:
    rewriter = Answering("A ball rolls.", "A blue ball rolls.")
    with pytest.warns(UserWarning, match=r"no usable prompt for 'a red ball' \(red is missing.*used as it is"):
        found = PromptEnhancer(rewriter).enhance(["a red ball"])[0]
    assert (found.text, found.by, rewriter.asked) == ("a red ball", "original", 2)
    with pytest.warns(UserWarning, match="the template enhancer is used"):
        found = PromptEnhancer(rewriter, EnhancerConfig(fallback="template")).enhance(["a red ball"])[0]
    assert found.by == "template"
    assert found.text.startswith("A red ball. ")


def test_the_next_answer_is_tried() -> None:
    rewriter = Answering("A ball rolls.", "Sure: A shiny red ball rolls.")
    found = PromptEnhancer(rewriter).enhance(["a red ball", "a red ball"])
    assert [each.text for each in found] == ["A shiny red ball rolls."] * 2
    assert rewriter.asked == 2


def test_answers_are_cached_by_prompt_model_and_settings(tmp_path: Path) -> None:
    path, rewriter = tmp_path / "cache" / "prompts.jsonl", Answering("A shiny red ball rolls.")
    assert not PromptEnhancer(rewriter, cache=path).enhance(["a red ball"])[0].cached
    again = PromptEnhancer(rewriter, cache=path).enhance(["a red ball"])[0]
    assert (again.cached, again.text, rewriter.asked) == (True, "A shiny red ball rolls.", 1)
    others: list[PromptEnhancer] = [
        PromptEnhancer(rewriter, EnhancerConfig(seed=1), cache=path),
        PromptEnhancer(rewriter, target=Target(style=STYLES["short"]), cache=path),
        PromptEnhancer(Answering("A shiny red ball rolls.", "x"), cache=path),
    ]
    assert not any(other.enhance(["a red ball"])[0].cached for other in others)
    assert not PromptEnhancer(rewriter, cache=path).enhance(["red ball"])[0].cached
    entry = json.loads(path.read_text().splitlines()[0])
    assert (entry["prompt"], entry["by"]) == ("a red ball", "answering")


def test_an_edited_cache_is_guarded(tmp_path: Path) -> None:
    path, rewriter = tmp_path / "prompts.jsonl", Answering("A shiny red ball rolls.")
    PromptEnhancer(rewriter, cache=path)(["a red ball"])
    path.write_text(path.read_text().replace("A shiny red ball rolls.", "A blue ball rolls."))
    again = PromptEnhancer(rewriter, cache=path)
    found = again.enhance(["a red ball"])[0]
    assert (found.cached, found.text, rewriter.asked) == (False, "A shiny red ball rolls.", 2)
    assert again.enhance(["a red ball"])[0].cached


def test_damaged_lines_of_the_cache_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    PromptCache(path).put("a", "one")
    with open(path, "ab") as file:
        file.write(b'{"key": "b", "te\xff\n[1]\n{"key": "c", "text": ""}\n{"key": "d", "text": "cut')
    with pytest.warns(UserWarning, match="4 damaged lines"):
        cache = PromptCache(path)
    cache.put("e", "five")
    with pytest.warns(UserWarning, match="4 damaged lines"):
        assert PromptCache(path).get("e") == "five"
    assert (cache.get("a"), cache.get("d")) == ("one", None)
    with pytest.raises(UserError, match="it is a folder"):
        PromptCache(tmp_path)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        PromptCache(file / "prompts.jsonl").put("a", "one")


_LONG = "text" * 5000
"""A text of several pages: the file grows page by page while a line is written."""


def _fill(path: Path, name: str) -> None:
    cache = PromptCache(path)
    for number in range(1_000_000):
        cache.put(f"{name}{number}", _LONG)
        time.sleep(random.random() / 1000)


def test_processes_share_a_cache_and_may_be_killed(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_fill, args=(path, name)) for name in "ab"]
    for child in children:
        child.start()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # A line that is being written is not damaged.
        while len(cache := PromptCache(path)) < 500 or None in (cache.get("a0"), cache.get("b0")):
            assert all(child.is_alive() for child in children)
    for child in children:
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cache = PromptCache(path)
    written = path.read_bytes()
    lines = written.count(b"\n")
    assert b"\n\n" not in written
    assert lines - 1 <= len(cache) <= lines + 1
    assert {cache.get("a0"), cache.get("b0")} == {_LONG}


def test_a_chat_model_is_asked_and_guarded(tmp_path: Path) -> None:
    model, tokenizer = tiny_chat(PROMPTS)
    greedy = ChatRewriter(model, tokenizer, max_new_tokens=8)
    target = Target()
    answers = greedy(PROMPTS[:2], target, 0)
    assert answers == [greedy([prompt], target, 5)[0] for prompt in PROMPTS[:2]]
    drawn = ChatRewriter(model, tokenizer, max_new_tokens=8, temperature=1.0)
    assert greedy.settings() != ChatRewriter(tiny_chat(PROMPTS, 1)[0], tokenizer, max_new_tokens=8).settings()
    state = torch.random.get_rng_state()
    first = drawn(PROMPTS[:1], target, 1)
    assert first == drawn(PROMPTS[:1], target, 1) != drawn(PROMPTS[:1], target, 2)
    assert torch.equal(torch.random.get_rng_state(), state)
    with pytest.warns(UserWarning, match="used as it is"):
        assert PromptEnhancer(greedy)(["a red ball"]) == ["a red ball"]
    model.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    loaded = get_rewriter(f"chat:{tmp_path / 'lm'}", device="cpu")
    loaded.max_new_tokens = 8
    assert loaded(PROMPTS[:2], target, 0) == answers
    before = loaded.settings()
    os.utime(tmp_path / "lm" / "config.json", (1, 1))
    assert loaded.settings() != before
    loaded.release()
    assert loaded(PROMPTS[:1], target, 0) == answers[:1]


def test_what_is_no_chat_model_is_refused(tmp_path: Path) -> None:
    model, tokenizer = tiny_chat(PROMPTS)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        ChatRewriter(model, tokenizer)
    with pytest.raises(UserError, match="needs its tokenizer"):
        ChatRewriter(model)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be loaded"):
        ChatRewriter(str(tmp_path))(["a"], Target(), 0)
    with pytest.raises(UserError, match="temperature"):
        ChatRewriter(str(tmp_path), temperature=-1)
    with pytest.raises(UserError, match="it has no config"):
        get_rewriter(f"chat:{tmp_path.parent}")


@pytest.mark.slow
def test_smollm2_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed("smollm2-135m")
    pytest.importorskip("gguf")
    monkeypatch.setenv("POSTGEN_CACHE", str(tmp_path))
    enhancer = PromptEnhancer(smollm2(), EnhancerConfig(fallback="template"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = enhancer.enhance(["a red ball rolls left", "two dogs on a beach"])
    assert all(check(each.original, each.text, plain=True).ok for each in found)


def test_the_argument_of_drop_in_pipelines(pipe: Any) -> None:
    call: dict[str, Any] = {"num_frames": 1, "height": 32, "width": 32, "num_inference_steps": 1, "output_type": "pt"}
    call["max_sequence_length"] = 24

    def made(*args: Any, **kwargs: Any) -> torch.Tensor:
        found: torch.Tensor = pipe(*args, **kwargs, **call, generator=torch.Generator().manual_seed(0)).frames
        return found

    plain, better = "red ball", PromptEnhancer().for_pipeline(pipe)(["red ball"])[0]
    wanted = made(better)
    assert torch.equal(made(plain, prompt_enhancer=True), wanted)
    assert torch.equal(made(prompt=plain, prompt_enhancer="template"), wanted)
    assert torch.equal(made(plain, prompt_enhancer=PromptEnhancer()), wanted)
    assert torch.equal(made(plain, prompt_enhancer=lambda prompts: [better for _ in prompts]), wanted)
    for off in (None, False, 0):
        assert torch.equal(made(plain, prompt_enhancer=off), made(plain))
    assert not torch.equal(made(plain), wanted)
    both = made([plain, "a blue cube falls"], prompt_enhancer=True)
    assert both.shape[0] == 2


@pytest.mark.parametrize(
    ("setting", "prompt", "message"),
    [
        (True, None, "needs prompt as a text"),
        (True, [1], "needs prompt as a text"),
        (1.5, "a", "must be True, a name"),
        ("nothing", "a", "no prompt enhancer 'nothing'"),
        (lambda prompts: ["a", "b"], "a", "must return 1 texts"),
        (lambda prompts: None, "a", "must return 1 texts"),
        (lambda prompts: [" "], "a", "must return 1 texts"),
    ],
)
def test_a_wrong_argument_is_refused(pipe: Any, setting: Any, prompt: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        enhanced_for_call(pipe, setting, prompt)
    assert enhanced_for_call(pipe, True, "") == ""


def test_segments_of_a_prompt_are_enhanced_one_by_one() -> None:
    from postgen.pipelines import LTXI2VLongMultiPromptPipeline, WanPipeline

    assert takes_segments(LTXI2VLongMultiPromptPipeline)
    assert not takes_segments(WanPipeline)

    def louder(prompts: list[str]) -> list[str]:
        return [f"{prompt}!" for prompt in prompts]

    assert by_segment(louder, ["a | b||c ", "d"], True) == ["a! | b! | c!", "d!"]
    assert by_segment(louder, ["a | b"], False) == ["a | b!"]
    assert by_segment(louder, [], True) == []
    bare = LTXI2VLongMultiPromptPipeline.__new__(LTXI2VLongMultiPromptPipeline)
    assert enhanced_for_call(bare, louder, "a|b") == "a! | b!"
    with pytest.raises(UserError, match="a text for each of 2 segments"):
        enhanced_for_call(bare, lambda prompts: ["one"], "a|b")
    with pytest.raises(UserError, match="cannot change prompt_segments, which replace prompt"):
        bare(prompt="a", prompt_segments=[{"text": "b"}], prompt_enhancer=True)


@pytest.mark.parametrize("prompts", ["a", [""], [1], ["\ud800"], None])
def test_wrong_prompts_are_refused(prompts: Any) -> None:
    with pytest.raises(UserError):
        PromptEnhancer()(prompts)


@pytest.mark.parametrize(
    ("setting", "value"), [("seed", -1), ("attempts", 0), ("most_words", 0.5), ("fallback", "none"), ("guard", 1)]
)
def test_wrong_settings_are_refused(setting: str, value: Any) -> None:
    with pytest.raises(UserError, match=setting):
        EnhancerConfig(**{setting: value})
    with pytest.raises(UserError, match="rewriter must be"):
        PromptEnhancer(3)  # type: ignore[arg-type]


def test_a_rewriter_must_return_a_text_per_prompt() -> None:
    class Wrong(Answering):
        def __call__(self, prompts: Any, target: Target, seed: int) -> list[str]:
            return []

    with pytest.raises(UserError, match="must return one text per prompt, 1"):
        PromptEnhancer(Wrong("a"))(["a red ball"])
    assert isinstance(TemplateRewriter().settings(), dict)
