"""Conversations: the four usual record shapes, told apart by their columns and brought to chat messages.

| shape | columns |
|---|---|
| messages | ``messages``: list of ``{role, content}`` |
| sharegpt | ``conversations``: list of ``{from, value}``; ``system`` |
| prompt-completion | ``prompt``, ``completion``: text, or lists of ``{role, content}`` |
| alpaca | ``instruction``, ``output``; ``input`` and ``system`` where they are not empty |
| named columns | any two text columns that the caller names |
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qtuning_kernels.data.sources import DataError

Message = dict[str, Any]

_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
# the speakers of answers, in any shape
ASSISTANT_NAMES = frozenset(name for name, role in _SHAREGPT_ROLES.items() if role == "assistant")
_MESSAGE_ROLES = ("system", "developer", "user", "assistant", "tool")


class NoAnswerError(DataError):
    """A record without an answer."""


@dataclass(frozen=True)
class Shape:
    """How records become messages.

    Attributes:
        name: the shape, for people.
        columns: the columns that it reads.
        separator: put between messages if a model has no chat template.
        to_messages: record -> messages; raises `DataError` without a location, which the caller adds.
    """

    name: str
    columns: tuple[str, ...]
    separator: str
    to_messages: Callable[[dict[str, Any]], list[Message]]


def detect_shape(columns: list[str], *, prompt_field: str | None = None, completion_field: str | None = None) -> Shape:
    """Choose the shape that fits `columns`; named fields win over every shape.

    Raises:
        DataError: nothing fits, or a named field is missing; lists the columns found.
    """
    found = f"columns found: {', '.join(columns) or 'none'}"
    if prompt_field is not None or completion_field is not None:
        if prompt_field is None or completion_field is None:
            raise DataError("prompt_field and completion_field go together; only one of them is given")
        for name, value in (("prompt_field", prompt_field), ("completion_field", completion_field)):
            if value not in columns:
                raise DataError(f"{name}={value!r} is not a column; {found}")
        return Shape(
            "named columns",
            (prompt_field, completion_field),
            "",
            lambda row: _pair(row, prompt_field, completion_field),
        )
    have = set(columns)
    if "messages" in have:
        return Shape("messages", ("messages",), "\n", _from_messages)
    if "conversations" in have:
        return Shape("sharegpt", ("system", "conversations"), "\n", _from_sharegpt)
    if {"prompt", "completion"} <= have:
        return Shape("prompt-completion", ("prompt", "completion"), "", lambda row: _pair(row, "prompt", "completion"))
    if {"instruction", "output"} <= have:
        return Shape("alpaca", ("system", "instruction", "input", "output"), "\n", _from_alpaca)
    raise DataError(
        f"unknown shape: {found}; accepted: messages | conversations | prompt + completion | "
        "instruction (+ input) + output | two columns named by prompt_field and completion_field "
        "(--prompt-field, --completion-field)"
    )


def _text(row: dict[str, Any], column: str, *, answer: bool = False, optional: bool = False) -> str:
    """The text of one column; numbers are taken as they print, since answers often are numbers."""
    value = row.get(column)
    if optional and value is None:
        return ""
    missing = value is None or (isinstance(value, str) and not value.strip())
    if answer and missing:
        what = f"column {column!r} is {'empty' if isinstance(value, str) else 'missing'}"
        raise NoAnswerError(f"no answer: {what}")
    if value is None:
        raise DataError(f"column {column!r} is missing")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise DataError(f"column {column!r} must be text, not {type(value).__name__}")
    return value


def _pair(row: dict[str, Any], prompt: str, completion: str) -> list[Message]:
    if isinstance(row.get(prompt), list) and isinstance(row.get(completion), list):
        return _checked([*_messages_of(row, prompt), *_messages_of(row, completion)])
    return [
        {"role": "user", "content": _text(row, prompt)},
        {"role": "assistant", "content": _text(row, completion, answer=True)},
    ]


def _from_alpaca(row: dict[str, Any]) -> list[Message]:
    system, context = _text(row, "system", optional=True), _text(row, "input", optional=True)
    question = _text(row, "instruction") + (f"\n\n{context}" if context.strip() else "")
    messages = [{"role": "system", "content": system}] if system.strip() else []
    return [
        *messages,
        {"role": "user", "content": question},
        {"role": "assistant", "content": _text(row, "output", answer=True)},
    ]


def _from_messages(row: dict[str, Any]) -> list[Message]:
    return _checked(_messages_of(row, "messages"))


def _from_sharegpt(row: dict[str, Any]) -> list[Message]:
    system = _text(row, "system", optional=True)
    messages = [{"role": "system", "content": system}] if system.strip() else []
    turns = _turns(row, "conversations")
    if turns and "from" not in turns[0]:
        return _checked([*messages, *_messages_of(row, "conversations")])
    for number, turn in enumerate(turns, 1):
        sender = turn.get("from")
        role = _SHAREGPT_ROLES.get(sender) if isinstance(sender, str) else None
        if role is None:
            raise DataError(f"turn {number} is from {sender!r}; accepted: {', '.join(_SHAREGPT_ROLES)}")
        if not isinstance(turn.get("value"), str):
            raise DataError(f"turn {number}: 'value' must be text, not {type(turn.get('value')).__name__}")
        messages.append({"role": role, "content": turn["value"]})
    return _checked(messages)


def _turns(row: dict[str, Any], column: str) -> list[dict[str, Any]]:
    turns = row.get(column)
    if turns is None:
        raise DataError(f"column {column!r} is missing")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise DataError(f"column {column!r} must be a list of messages")
    return turns


def _messages_of(row: dict[str, Any], column: str) -> list[Message]:
    messages = []
    for number, turn in enumerate(_turns(row, column), 1):
        # Parquet fills absent keys with None, which templates would print
        turn = {key: value for key, value in turn.items() if value is not None}
        if turn.get("role") not in _MESSAGE_ROLES:
            raise DataError(f"message {number} has role {turn.get('role')!r}; accepted: {', '.join(_MESSAGE_ROLES)}")
        content = turn.get("content")
        if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
            turn["content"] = content = "".join(str(part.get("text", "")) for part in content)
        if not isinstance(content, str) and not (content is None and turn.get("tool_calls")):
            raise DataError(f"message {number}: 'content' must be text, not {type(content).__name__}")
        messages.append(turn)
    return messages


def _checked(messages: list[Message]) -> list[Message]:
    """Messages cut after their last answer; what follows an answer teaches nothing."""
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise NoAnswerError("no answer: no message of the assistant")
    if not any((messages[i].get("content") or "").strip() or messages[i].get("tool_calls") for i in answers):
        raise NoAnswerError("no answer: every message of the assistant is empty")
    return messages[: answers[-1] + 1]
