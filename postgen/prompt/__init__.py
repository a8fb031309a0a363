"""Prompt enhancement: rewrite short prompts for a video model, with a guard that keeps what the user said."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from postgen.prompt.cache import PromptCache as PromptCache
    from postgen.prompt.chat import ChatRewriter as ChatRewriter
    from postgen.prompt.enhancer import Enhanced as Enhanced
    from postgen.prompt.enhancer import EnhancerConfig as EnhancerConfig
    from postgen.prompt.enhancer import PromptEnhancer as PromptEnhancer
    from postgen.prompt.enhancer import Rewriter as Rewriter
    from postgen.prompt.guard import GuardConfig as GuardConfig
    from postgen.prompt.guard import Verdict as Verdict
    from postgen.prompt.guard import check as check
    from postgen.prompt.naming import get_rewriter as get_rewriter
    from postgen.prompt.openai_api import ApiRewriter as ApiRewriter
    from postgen.prompt.smollm import smollm2 as smollm2
    from postgen.prompt.styles import STYLES as STYLES
    from postgen.prompt.styles import Style as Style
    from postgen.prompt.target import Target as Target
    from postgen.prompt.target import target_of as target_of
    from postgen.prompt.templates import TemplateRewriter as TemplateRewriter

_HOMES = {
    "ApiRewriter": "openai_api",
    "ChatRewriter": "chat",
    "Enhanced": "enhancer",
    "EnhancerConfig": "enhancer",
    "GuardConfig": "guard",
    "PromptCache": "cache",
    "PromptEnhancer": "enhancer",
    "Rewriter": "enhancer",
    "STYLES": "styles",
    "Style": "styles",
    "Target": "target",
    "TemplateRewriter": "templates",
    "Verdict": "guard",
    "check": "guard",
    "get_rewriter": "naming",
    "smollm2": "smollm",
    "target_of": "target",
}
"""Public name -> its module, which is imported when the name is first used."""
__all__ = [
    "STYLES",
    "ApiRewriter",
    "ChatRewriter",
    "Enhanced",
    "EnhancerConfig",
    "GuardConfig",
    "PromptCache",
    "PromptEnhancer",
    "Rewriter",
    "Style",
    "Target",
    "TemplateRewriter",
    "Verdict",
    "check",
    "get_rewriter",
    "smollm2",
    "target_of",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
