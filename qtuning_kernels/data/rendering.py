"""Conversations as text, and where their answers are in it: with the model's chat template, or without one."""

import os
import re
from collections.abc import Callable
from copy import deepcopy
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from qtuning_kernels.data.conversations import Message, Shape, is_trained
from qtuning_kernels.data.sources import DataError

MARK = "\U000f5a3c"  # a private character; stands in special tokens that the data spells, until they are tokenised

Span = tuple[int, int]  # characters [start, end) of a rendered conversation


def refuse_dropped_tools(messages: list[Message], tools: list[Any] | None, render: Callable[..., Any]) -> None:
    """Raise `DataError` if the text lacks a tool that is declared or called: the template drops it.

    Asked of names that no text has: those that the record gives may stand in a question, too.
    """
    if not tools and not any(message.get("tool_calls") for message in messages):
        return
    messages, tools = deepcopy((messages, tools or []))
    names: dict[str, Any] = {}
    for tool in (*tools, *(call for message in messages for call in message.get("tool_calls") or ())):
        function = tool.get("function", tool) if isinstance(tool, dict) else {}
        unique = f"renamed_{len(names)}_"
        names[unique], function["name"] = function.get("name"), unique
    text = render(messages, tools)[0]
    if dropped := [name for unique, name in names.items() if unique not in text]:
        raise DataError(f"the model's chat template drops the tool {dropped[0]!r}")


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern:
    """A pattern of the special tokens as texts, the longest first."""
    texts = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


class PlainRenderer:
    """Messages one after the other, each answer followed by the end-of-sequence token."""

    add_special_tokens = True  # the tokenizer's own beginning, since no template writes it

    def __init__(self, tokenizer: PreTrainedTokenizerBase, shape: Shape) -> None:
        if tokenizer.eos_token is None:
            raise ValueError("the tokenizer has neither a chat template nor an end-of-sequence token")
        self.tokenizer, self.eos, self.separator = tokenizer, tokenizer.eos_token, shape.separator

    def render(self, messages: list[Message], tools: list[Any] | None) -> tuple[str, list[Span]]:
        text, spans = "", []
        for message in messages:
            text += self.separator if text else ""
            start = len(text)
            text += message.get("content") or ""
            if message["role"] == "assistant":
                text += self.eos
            if is_trained(message):
                spans.append((start, len(text)))
        return text, spans


class TemplateRenderer:
    """The chat template's text, and the spans of its answers.

    An answer begins where the rendering of the messages before it, generation prompt included, ends, and it
    ends where the rendering of the messages up to it ends; so no template needs ``{% generation %}`` marks.
    """

    add_special_tokens = False  # templates write theirs

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer, self.special = tokenizer, special_tokens(tokenizer)
        self.tools: list[Any] | None = None

    def _template(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        text = self.tokenizer.apply_chat_template(
            messages, tools=self.tools, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return cast(str, text)

    def render(self, messages: list[Message], tools: list[Any] | None) -> tuple[str, list[Span]]:
        self.tools = tools
        text = self._template(messages)
        spans = []
        for i, message in enumerate(messages):
            if is_trained(message):
                start = self._start(messages[:i], text)
                # a template may write an answer differently once it is no longer the last one
                upto = text if i + 1 == len(messages) else self._template(messages[: i + 1])
                end = len(upto) if text.startswith(upto) else self._end(message, text, start)
                spans.append((start, self._without_tail(text, start, end)))
        return text, spans

    def _start(self, before: list[Message], text: str) -> int:
        if not before:  # the assistant opens the conversation
            return 0
        prompt = self._template(before, add_generation_prompt=True)
        if text.startswith(prompt):
            return len(prompt)
        # some generation prompts open a block that a written answer lacks
        if not text.startswith(self._template(before)):
            raise DataError("the chat template rewrites earlier messages, so its answers cannot be found")
        return len(os.path.commonprefix([prompt, text]))  # noqa: RUF071 - characters are meant

    def _end(self, message: Message, text: str, start: int) -> int:
        content = (message.get("content") or "").strip()
        at = text.find(content, start)
        if not content or at < 0:
            raise DataError("the chat template rewrites an earlier answer, so its end cannot be found")
        end = at + len(content)
        token = self.special.match(text, end)
        return token.end() if token else end

    def _without_tail(self, text: str, start: int, end: int) -> int:
        """Leave out the line break that templates put behind the end-of-turn token; no model generates it."""
        stripped = text[start:end].rstrip()
        last = [token.end() for token in self.special.finditer(stripped)][-1:]
        return start + len(stripped) if last == [len(stripped)] else end
