"""Words: training captions and the vocabulary have every word of the world; unknown words are detected."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from postgen import world
from postgen.training.tokenizers import tokenize, train_tokenizer, unknown_words, word_tokenizer
from postgen.world import words as tables
from postgen.world.camera import camera_path
from postgen.world.scenes import draw_scenes
from postgen.world.spec import BACKGROUNDS, CAMERAS, COLOURS, EVENTS
from postgen.world.wording import EVENT_FORMS, UNKNOWN, captions, world_words

COUNT = 1500


@pytest.fixture(scope="module")
def scenes():
    return draw_scenes(5_000_000, COUNT, 33, captions=4, synonym_share=0.3)


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer(world_words())


def test_the_vocabulary_has_every_word_of_the_world(tokenizer):
    phrases = list(COLOURS)
    # The judge's numbers, negations and other known words of prompts are not wordings of scenes.
    names = {name for name in dir(tables) if name.isupper() and name[0] != "_"}
    for table in (getattr(tables, name) for name in sorted(names - {"NUMBERS", "NEGATIONS", "KNOWN_WORDS"})):
        # Values are wordings; keys are too, if the values are strings (synonyms). Names in braces are filled in.
        rows = [table] if isinstance(table, tuple) else [(k, v) if isinstance(v, str) else v for k, v in table.items()]
        phrases += [phrase for row in rows for phrase in row]
    wanted = set(re.findall("[a-z]+", re.sub(r"\{\w+\}", "", " ".join(phrases))))
    assert not wanted - set(tokenizer.get_vocab())
    assert len(wanted) > 100


def test_every_word_is_trained(scenes):
    counts = Counter(word for scene in scenes for text in scene.captions for word in re.findall("[a-z]+", text))
    assert set(counts) == set(world_words())
    assert min(counts.values()) >= 3


def test_captions_are_tokens_that_the_tokenizer_knows(scenes, tokenizer):
    texts = [text for scene in scenes for text in scene.captions]
    ids = tokenize(tokenizer, texts, 48)
    assert not (ids == tokenizer.unk_token_id).any()
    # No text is truncated: every text ends with padding.
    assert (ids[:, -1] == 0).all()


def test_other_words_say_the_same_scene(scenes):
    for scene in scenes[:250]:
        wanted = Counter((b.colour, b.shape, b.event) for b in scene.spec.bodies)
        for text in scene.captions:
            found = world.parse(text)
            assert found is not None, text
            assert Counter((b.colour, b.shape, b.event) for b in found.bodies) == wanted, text
            assert found.camera == scene.spec.camera, text


def test_cameras_and_floors_are_all_there(scenes):
    cameras = Counter(scene.spec.camera for scene in scenes)
    floors = Counter(scene.spec.background for scene in scenes)
    assert set(cameras) == set(CAMERAS)
    assert set(floors) == set(BACKGROUNDS)
    assert 0.1 <= 1 - cameras["static"] / COUNT <= 0.3
    assert min(cameras.values()) >= 0.012 * COUNT
    assert min(floors.values()) >= 0.2 * COUNT
    for scene in scenes[:400]:
        spec = scene.spec
        position, rotation = camera_path(spec, 0, 33)
        moved = (rotation - rotation[0]).abs().amax() + (position - position[0]).abs().amax()
        assert (moved > 0.1) == (spec.camera != "static"), spec.camera


def test_forms_of_all_events_are_read_as_such():
    assert set(EVENT_FORMS) == set(EVENTS)
    for event, forms in EVENT_FORMS.items():
        for form in forms:
            text = form.format(roll="rolls", rolling="rolling", other="a blue cube")
            assert world.parse(f"a red ball {text}").bodies[0].event == event, text


def test_moves_of_the_camera_are_said_in_all_ways(scenes):
    texts = [text for scene in scenes if scene.spec.camera != "static" for text in scene.captions]
    forms = {form for forms in tables.CAMERA_FORMS.values() for form in forms}
    assert {form for form in forms if any(text.endswith((form, f"{form}.")) for text in texts)} >= {
        form for move, forms in tables.CAMERA_FORMS.items() if move != "static" for form in forms
    }
    joined = sum(" while the camera" in text for text in texts)
    assert 0.05 <= joined / len(texts) <= 0.5


def test_without_a_share_captions_are_those_of_the_world():
    spec = world.sample(3, num_bodies=2)
    assert captions(spec, [7, 8], 0.0) == (world.simple_caption(spec), world.caption(spec, 7), world.caption(spec, 8))
    assert captions(spec, [7], 1.0)[1] != world.caption(spec, 7)
    assert captions(spec, [7], 0.0, 1.0)[1].split().count(UNKNOWN) == 1


def test_a_stray_word_is_the_unknown_token(tokenizer):
    assert tokenizer("a <unk> red ball")["input_ids"] == tokenizer("a shiny red ball")["input_ids"]
    assert tokenizer("a <unk> red ball")["input_ids"].count(tokenizer.unk_token_id) == 1


def test_unknown_words_of_a_prompt(tokenizer):
    assert unknown_words(tokenizer, "A Cat and a RED ball, with a cat on 3 sofas!") == ["cat", "3", "sofas"]
    assert unknown_words(tokenizer, "a medium-sized crimson box is rolling left; slowly.") == ["slowly"]
    assert unknown_words(tokenizer, "") == []
    # A tokenizer of pieces can spell every word.
    assert unknown_words(train_tokenizer(["a red ball"], 300), "a cat") == []


def test_it_survives_saving(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "A shiny RED ball, medium-sized."
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert unknown_words(again, text) == ["shiny"]
