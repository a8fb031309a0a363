"""Recipes and prompts by name: each can be listed, shown, copied, and run from any folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from postgen.errors import UserError
from postgen.shipped import FOLDER, find_shipped, recipe_file, shipped
from postgen.training import METHODS, load_recipe

ROOT = Path(__file__).resolve().parents[1]
RECIPES = [item for item in shipped() if item.kind == "recipe"]


def test_every_file_of_the_folder_has_a_name():
    files = {path for path in (ROOT / "recipes").rglob("*") if path.is_file()}
    assert {item.path for item in shipped()} == files
    assert len(RECIPES) >= 17
    for item in RECIPES:
        assert item.method in METHODS, item.name
        assert 10 <= len(item.about) <= 100, item.name
        assert item.needs, f"{item.name}: its comment has no line that begins with 'Needs: '"
        assert f"recipes/{item.name}.yaml" in item.command, item.name
        assert all((FOLDER / place).is_file() for place in item.reads)
    assert all(item.about for item in shipped() if item.kind == "accelerate")


def test_facts_of_a_recipe():
    tiny = find_shipped("dancegrpo-tiny")
    assert tiny.reads == ("prompts/two-bodies.jsonl", "prompts/two-bodies-held-out.jsonl")
    assert (tiny.method, tiny.lacks) == ("dancegrpo", ())
    assert tiny.needs.startswith("one GPU; 8.5 minutes on an H100")
    nested = find_shipped("fast-video.yaml")
    assert (nested.method, nested.lacks) == (
        "dancegrpo",
        ("train_dataset prompts.jsonl", "eval_dataset held-out.jsonl"),
    )
    assert find_shipped("dancegrpo").reads == ("accelerate/ddp.yaml",)
    assert find_shipped("tiny-wan").command == "torchrun --nproc_per_node 4 -m postgen.train recipes/tiny-wan.yaml"
    assert find_shipped("prompts/two-bodies.jsonl").path.name == "two-bodies.jsonl"


@pytest.mark.parametrize("item", RECIPES, ids=lambda item: item.name)
def test_a_recipe_is_loaded_by_name_from_anywhere(item, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--student", str(tmp_path)] if item.name == "lit-tiny-wan-lora" else []
    _, config = load_recipe(item.name, words)
    for name in ("train_dataset", "eval_dataset"):
        given = getattr(config, name, None)
        if given is not None and f"{name} {given}" not in item.lacks:
            assert Path(given).is_absolute()
            assert Path(given).is_file()
    assert not Path(config.output_dir).is_absolute()
    assert os.listdir(tmp_path) == []


def test_files_beside_a_recipe_come_before_those_of_the_current_folder(tmp_path, monkeypatch):
    for place in ("own/p.jsonl", "p.jsonl", "h.jsonl"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_text('{"prompt": "a ball"}\n')
    values = "method: dancegrpo\noutput_dir: runs/x\nreward_funcs: [world]\n"
    prompts = "prompts: {train_dataset: p.jsonl, eval_dataset: h.jsonl}\n"
    (tmp_path / "own" / "r.yaml").write_text(values + prompts)
    monkeypatch.chdir(tmp_path)
    config = load_recipe("own/r.yaml")[1]
    assert (config.train_dataset, config.eval_dataset, config.output_dir) == ("own/p.jsonl", "h.jsonl", "runs/x")
    assert load_recipe("own/r.yaml", ["--train_dataset", "p.jsonl"])[1].train_dataset == "p.jsonl"
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    config = load_recipe("../own/r.yaml")[1]
    assert (config.train_dataset, config.eval_dataset) == (str(tmp_path / "own" / "p.jsonl"), "h.jsonl")


def test_a_file_comes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert recipe_file("nft-tiny") == FOLDER / "nft-tiny.yaml"
    Path("nft-tiny").mkdir()
    assert recipe_file("nft-tiny") == FOLDER / "nft-tiny.yaml"
    Path("fast-tiny").write_text("method: lit")
    assert recipe_file("fast-tiny") == Path("fast-tiny")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("dancgrpo-tiny", "Did you mean 'dancegrpo-tiny'\\? `postgen recipes` lists"),
        ("quite-another", "nor a shipped recipe of this name. `postgen recipes` lists"),
        ("x" * 5000, "characters\\) cannot be read: there is neither such a file nor"),
        ("recipes/dancegrpo-tiny.yaml", "no such file. For the shipped recipe of this name, write 'dancegrpo-tiny'"),
        ("accelerate/ddp", "is not a recipe but a configuration for `accelerate launch`"),
        ("accelerate/ddp.yaml", "is not a recipe but a configuration for `accelerate launch`"),
        ("nft-tiny.yml", "no such file. For the shipped recipe of this name, write 'nft-tiny'"),
    ],
)
def test_what_is_said_of_a_wrong_name(given, message, tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        load_recipe(given)
    ended = cli("train", given)
    assert (ended.code, ended.out, ended.err.count("\n")) == (2, "", 1)


def test_what_is_said_of_a_folder_and_of_a_name_without_its_ending(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    Path("other.yaml").write_text("method: lit")
    for given, message in {"mine": "it is a folder", ".": "it is a folder", "other": "mean 'other.yaml'"}.items():
        with pytest.raises(UserError, match=message):
            load_recipe(given)


def test_list_and_show(cli):
    listed = cli("recipes")
    assert (listed.code, listed.err) == (0, "")
    assert all(item.name in listed.out for item in shipped())
    assert "dancegrpo; one GPU; 8.5 minutes on an H100" in " ".join(listed.out.split())
    assert "2,048 prompts" in listed.out
    assert cli("recipes", "show", "nft-tiny").out == (ROOT / "recipes" / "nft-tiny.yaml").read_text()
    wrong = cli("recipes", "show", "nft-tini")
    assert (wrong.code, wrong.err.count("\n")) == (2, 1)
    assert "Did you mean 'nft-tiny'?" in wrong.err
    assert "Did you mean 'accelerate/ddp'?" in cli("recipes", "copy", "ddp").err


def test_a_copy_runs_where_it_is(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copied = cli("recipes", "copy", "nft-tiny", "my own")
    assert copied.code == 0
    files = ["my own/nft-tiny.yaml", "my own/prompts/two-bodies.jsonl", "my own/prompts/two-bodies-held-out.jsonl"]
    assert copied.out.splitlines() == [*files, "Run it: postgen train 'my own/nft-tiny.yaml'"]
    assert load_recipe("my own/nft-tiny.yaml")[1].train_dataset == files[1]
    # Another recipe with the same prompts can be copied to the same folder.
    assert cli("recipes", "copy", "fast-tiny", "my own").code == 0
    assert cli("recipes", "copy", "dancegrpo").out.splitlines() == [
        "recipes/dancegrpo.yaml",
        "recipes/accelerate/ddp.yaml",
        "It needs your own files, or other values for these keys: train_dataset prompts.jsonl, "
        "eval_dataset held-out.jsonl",
        "Run it: accelerate launch --config_file recipes/accelerate/ddp.yaml -m postgen.train recipes/dancegrpo.yaml "
        "--fully_shard true",
    ]


def test_nothing_is_overwritten(cli, tmp_path):
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "two-bodies-held-out.jsonl").write_text("mine")
    ended = cli("recipes", "copy", "nft-tiny", tmp_path)
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "two-bodies-held-out.jsonl already exists with other content" in ended.err
    assert [path.name for path in tmp_path.rglob("*")] == ["prompts", "two-bodies-held-out.jsonl"]
    (tmp_path / "nft-tiny.yaml").write_text("mine")
    assert "nft-tiny.yaml already exists" in cli("recipes", "copy", "nft-tiny", tmp_path).err
    (tmp_path / "file").write_text("x")
    assert "is empty" in cli("recipes", "copy", "nft-tiny", "").err
    assert "file is not a folder" in cli("recipes", "copy", "nft-tiny", tmp_path / "file").err


def test_listing_is_light():
    script = "import sys, json\nfrom postgen.shipped import shipped\nshipped()\nprint(json.dumps(sorted(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "numpy", "diffusers", "trl"} & set(json.loads(out))
