"""Rewrite prompts with a chat model of transformers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from postgen.errors import UserError, check_number, shown
from postgen.prompt.guard import sentences_of
from postgen.prompt.instructions import messages_for
from postgen.prompt.target import Target
from postgen.training.digests import weights_digest


class ChatRewriter:
    """Rewriter that asks a language model with a chat template.

    Prompts are rewritten one at a time, so that an answer does not depend on the other prompts of a batch.

    Args:
        model: folder or Hub id; or a loaded model, which needs `tokenizer`.
        tokenizer: tokenizer of a loaded model.
        device: device of a model that is loaded here: cpu, cuda, cuda:N or mps; auto is a GPU if there is one.
        dtype: dtype of a model that is loaded here; auto is that of its files.
        temperature: 0 always takes the most likely token; above 0, tokens are drawn with the seed. At most 10.
        max_new_tokens: largest number of tokens of an answer, including reasoning.
        sentences: largest number of sentences that are taken from an answer; None: all. Small models drift away from
            the prompt after the first sentence.
        examples: whether the instructions contain two examples, which small models need.
        generation: further arguments of `generate` of transformers, such as `repetition_penalty`.
        name: name in messages and caches.

    Raises:
        UserError: the model cannot be loaded or has no chat template, or a number is out of range.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        device: str = "auto",
        dtype: str = "auto",
        temperature: float = 0.0,
        max_new_tokens: int = 256,
        sentences: int | None = None,
        examples: bool = True,
        generation: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> None:
        check_number("temperature", temperature, 0, 10)
        check_number("max_new_tokens", max_new_tokens, 1, 100_000, whole=True)
        self.temperature, self.max_new_tokens, self.examples = temperature, max_new_tokens, examples
        if sentences is not None:
            check_number("sentences", sentences, 1, 1000, whole=True)
        self.sentences, self.generation = sentences, dict(generation or {})
        self.seeded = temperature > 0
        self._model: Any = None
        self._tokenizer, self._device, self._dtype = tokenizer, device, dtype
        self._source: str | None = None
        if isinstance(model, str | Path):
            self._source = str(model)
            self.name = name or f"chat:{self._source}"
            check_chat_model(self._source)
        else:
            if tokenizer is None:
                raise UserError("a loaded chat model needs its tokenizer: ChatRewriter(model, tokenizer)")
            self._model, self.name = model, name or f"chat:{type(model).__name__}"
            _check_template(tokenizer, self.name)

    def settings(self) -> Mapping[str, Any]:
        """Return the settings for the key of a cache; the files of a local model are identified by size and time."""
        return {
            "model": self._fingerprint(),
            "temperature": self.temperature,
            "max_new_tokens": self.max_new_tokens,
            "sentences": self.sentences,
            "examples": self.examples,
            "generation": {key: repr(value) for key, value in sorted(self.generation.items())},
        }

    def __call__(self, prompts: Sequence[str], target: Target, seed: int) -> list[str]:
        """Return the answers; the model is loaded on the first call."""
        self.load()
        return [self._answer(prompt, target, seed) for prompt in prompts]

    def load(self) -> None:
        """Load the model, if it is not loaded yet.

        Raises:
            UserError: the model cannot be loaded.
        """
        if self._model is None and self._source is not None:
            self._model, self._tokenizer = load_chat_model(self._source, self._device, self._dtype)
            _check_template(self._tokenizer, self._source)

    def release(self) -> None:
        """Free the memory of a model that was loaded here; the next call loads it again."""
        if self._source is not None:
            self._model = self._tokenizer = None

    @torch.no_grad()
    def _answer(self, prompt: str, target: Target, seed: int) -> str:
        model, tokenizer = self._model, self._tokenizer
        assert model is not None
        messages = messages_for(prompt, target, examples=self.examples)
        text = _templated(tokenizer, messages)
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False).to(model.device)
        sampled = {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            tokens = model.generate(
                **{name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs},
                max_new_tokens=self.max_new_tokens,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
                **sampled,
                **self.generation,
            )
        answer: str = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return answer if self.sentences is None else " ".join(sentences_of(answer)[: self.sentences])

    def _fingerprint(self) -> str:
        if self._source is None:
            return weights_digest(self._model)
        folder = Path(self._source).expanduser()
        if not folder.is_dir():
            return self._source
        rows = sorted(
            f"{file.relative_to(folder)} {file.stat().st_size} {file.stat().st_mtime_ns}"
            for file in folder.rglob("*")
            if file.is_file()
        )
        return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def check_chat_model(source: str) -> None:
    """Check, without loading weights, that a name can be a chat model.

    Raises:
        UserError: there is no such folder, or the name is no Hub id.
    """
    from postgen.families.model_folder import is_hub_id
    from postgen.reading import check_name

    check_name(source, f"the chat model {shown(source)}")
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{source} is not a language model of transformers: it has no config.json")
    elif not is_hub_id(source):
        raise UserError(f"there is no chat model {source}: give a folder, or a Hub id (owner/name)")


def load_chat_model(source: str, device: str = "auto", dtype: str = "auto", **kwargs: Any) -> tuple[Any, Any]:
    """Load a language model of transformers and its tokenizer.

    Args:
        source: folder or Hub id.
        device: cpu, cuda, cuda:N, mps or auto.
        dtype: auto, float32, bfloat16 or float16.
        kwargs: further arguments of `from_pretrained`.

    Raises:
        UserError: it cannot be loaded, or the device does not exist.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from postgen.families.loading import check_device

    place = check_device(device)
    folder = str(Path(source).expanduser()) if Path(source).expanduser().is_dir() else source
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **kwargs)
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype if dtype == "auto" else getattr(torch, dtype), **kwargs
        )
    except Exception as error:  # transformers and the Hub raise many kinds of exceptions
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the chat model {source} cannot be loaded: {reason}") from error
    return model.to(place).eval(), tokenizer


def _check_template(tokenizer: Any, name: str) -> None:
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(f"{name} is not a chat model: its tokenizer has no chat template")


def _templated(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """Return the text of a conversation; models without a system role get it in the first message of the user."""
    from jinja2 import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError:
        system, first, *rest = messages
        joined = {"role": "user", "content": f"{system['content']}\n\n{first['content']}"}
        text = tokenizer.apply_chat_template([joined, *rest], tokenize=False, add_generation_prompt=True)
    return text
