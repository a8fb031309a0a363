"""Only postgen.compat uses private names of diffusers, transformers, accelerate, peft and trl."""

import ast

import pytest

from tests.parsed import tree_of
from tests.private_names import kin, replaced, touched
from tests.test_layout import library

OWN = """
class Base:
    __slots__ = ("_kept",)
    _table = {}

    def __init__(self):
        self._mine, self.public = 1, 2

    def _step(self):
        return self._mine + len(type(self)._table)


class Other(Base):
    def _more(self, other):
        return super()._step() + self._step() + other._mine + getattr(other, "_mine", 0)
"""


def test_the_library_keeps_to_the_rule():
    sources = {module: path.read_text(encoding="utf-8") for module, path in library()}
    related = kin(map(tree_of, sources.values()))
    found = [line for module, source in sources.items() for line in touched(module, source, related)]
    found += [line for module, source in sources.items() for line in replaced(module, source)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "base", ["import diffusers\nclass A(diffusers.ConfigMixin)", "from diffusers import ConfigMixin as W\nclass A(W)"]
)
def test_a_private_name_of_a_parent_is_not_defined_anew(base):
    for body in ("_get_init_keys = None", "def _get_init_keys(cls):\n        pass"):
        source = f"{base}:\n    {body}"
        assert replaced("postgen.families.wan", source) == [
            "postgen.families.wan:2: A defines _get_init_keys of ConfigMixin"
        ]
        assert replaced("postgen.compat", source) == replaced("postgen.x", source.replace("_get_init", "_mine")) == []


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("def f(pipe):\n    return pipe._execution_device", "pipe._execution_device"),
        ("def f(pipe):\n    pipe._guidance_scale = 2", "pipe._guidance_scale"),
        ("def f(module):\n    module.processor._attention_backend = 1", "module.processor._attention_backend"),
        ("def f(pipe):\n    return pipe.transformer.blocks[0]._chunk_size", "blocks[0]._chunk_size"),
        ("def f(pipe):\n    return getattr(pipe, '_name')", "getattr(pipe, '_name')"),
        ("def f(pipe):\n    return hasattr(pipe.vae, '_name')", "hasattr(pipe.vae, '_name')"),
        ("def f(pipe):\n    setattr(pipe, '_name', 1)", "setattr(pipe, '_name', 1)"),
        ("def f(pipe):\n    delattr(pipe, '_name')", "delattr(pipe, '_name')"),
        ("def f(pipe):\n    object.__setattr__(pipe, '_name', 1)", "object.__setattr__(pipe, '_name', 1)"),
        ("def f(pipe):\n    return vars(pipe)['_name']", "'_name'"),
        ("NAMES = ('_attention_backend', 'heads')", "'_attention_backend'"),
        ("from operator import attrgetter\nfind = attrgetter('vae._name')", "'vae._name'"),
        ("MODULE = 'diffusers.hooks._helpers'", "'diffusers.hooks._helpers'"),
        ("def f(pipe, name):\n    return getattr(pipe, f'_{name}')", "getattr(pipe, f'_{name}')"),
        ("def f(pipe, name):\n    return getattr(pipe, '_' + name)", "getattr(pipe, '_' + name)"),
        ("def f(pipe):\n    match pipe:\n        case Pipe(_name=x):\n            return x", "_name="),
        ("PLACE = 'diffusers.hooks:_helper'", "'diffusers.hooks:_helper'"),
        ("def f(load):\n    return load('._helpers', 'diffusers.hooks')", "'._helpers'"),
        ("def f(load, name):\n    return load(f'diffusers.hooks._{name}')", "f'diffusers.hooks._{name}'"),
        ("def f(pipe):\n    return (found := pipe)._name", "(found := pipe)._name"),
        ("from diffusers.hooks._helpers import *", "diffusers.hooks._helpers.*"),
        ("def f(pipe):\n    return pipe.__dict__['_name']", "'_name'"),
        ("from diffusers import WanPipeline\nx = WanPipeline._name", "WanPipeline._name"),
        ("from diffusers.hooks import _registry", "diffusers.hooks._registry"),
        ("def f():\n    from diffusers.hooks._helpers import Thing", "diffusers.hooks._helpers.Thing"),
        ("import diffusers.hooks._common as common", "diffusers.hooks._common"),
        ("import peft\nx = peft.tuners._name", "peft.tuners._name"),
        ("from diffusers import hooks as h\nx = h._registry", "h._registry"),
        ("from accelerate import state\nx = state._shared()._name", "state._shared()._name"),
        ("def f(attend, q):\n    return attend(q, _parallel_config=None)", "_parallel_config="),
        # Accessed through a class of the project.
        ("from trl import X\nclass A(X):\n    def f(self):\n        return self._signature", "self._signature"),
        ("from trl import X\nclass A(X):\n    def f(self):\n        return super()._signature", "super()._signature"),
        ("class A:\n    def f(self):\n        return self.pipe._name", "self.pipe._name"),
        # A function of the module with the same name does not make the name of an object our own.
        ("def _name():\n    pass\ndef f(pipe):\n    return pipe._name", "pipe._name"),
    ],
)
def test_a_private_name_is_found(source, what):
    (line,) = [line for line in touched("postgen.families.wan", source) if what in line]
    assert "only postgen.compat may" in line
    assert touched("postgen.compat", source) == touched("postgen.compat.attention", source) == []


@pytest.mark.parametrize(
    "source",
    [
        OWN,
        "from typing import NamedTuple\nclass P(NamedTuple):\n    x: int\ndef f(p):\n    return p._replace(x=1)",
        "import os\nimport torch\ndef f():\n    os._exit(torch._C._get_x())",
        "def f(linear):\n    return linear._forward_hooks",
        "class A:\n    def f(self):\n        if hasattr(self, '_bar'):\n            self._bar = 1",
        "def f(name):\n    return f'{name}_seconds', __name__, 'a_b', '_', '__call__'",
        "def _helper():\n    pass\nx = _helper()",
        "KEY = '_class_name'",
    ],
)
def test_names_of_ones_own_are_free(source):
    assert touched("postgen.families.wan", source) == []


def test_names_of_a_parent_elsewhere_are_ones_own():
    child = "class Child(Base):\n    def f(self):\n        return self._step()"
    related = kin([ast.parse(OWN), ast.parse(child)])
    assert touched("postgen.families.child", child, related) == []
    assert touched("postgen.families.child", child) != []
    # Names of an unrelated class, and names of an argument, are not our own.
    stranger = child.replace("(Base)", "")
    assert touched("postgen.families.child", stranger, kin([ast.parse(OWN), ast.parse(stranger)])) != []
    handed = "class Child(Base):\n    def f(self, other):\n        return other._step()"
    assert touched("postgen.families.child", handed, kin([ast.parse(OWN), ast.parse(handed)])) != []
