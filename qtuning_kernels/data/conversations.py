"""Conversations: the usual record shapes, told apart by their columns and brought to chat messages.

| shape | columns |
|---|---|
| messages | ``messages``: list of ``{role, content}``; ``tools`` |
| sharegpt | ``conversations``: list of ``{from, value}``; ``system``, ``tools`` |
| prompt-completion | ``prompt``, ``completion``: text, or lists of ``{role, content}``; KTO's ``label`` |
| alpaca | ``instruction``, ``output`` or ``response``; where not empty ``system``, ``input`` or ``context`` |
| question-answer | ``question``, ``answer`` |
| named columns | any text columns that the caller names |
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
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
    "function_call": "assistant",
}
# the speakers of answers, in any shape
ASSISTANT_NAMES = frozenset(name for name, role in _SHAREGPT_ROLES.items() if role == "assistant")
_MESSAGE_ROLES = ("system", "developer", "user", "assistant", "tool")


_MEDIA = ("image", "images", "audio", "audios", "video", "videos")
# of an image or the like that is not there; with the end of an element it is text
_PLACEHOLDER = re.compile(r"\s*<(image|audio|video)>(?!.*</)|.*<(image|audio|video)>\s*$", re.DOTALL)


class LeftOutError(DataError):
    """A record that is marked as not to be trained on."""


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
        prompts = [prompt_field] if prompt_field in columns else prompt_field.split(",")
        for name, value in (*(("prompt_field", each) for each in prompts), ("completion_field", completion_field)):
            if value not in columns:
                raise DataError(f"{name}={value!r} is not a column; {found}")
        named = (*prompts, completion_field)
        return Shape("named columns", named, "", lambda row: _pair(row, prompts, completion_field))
    have = set(columns)
    if "messages" in have:
        return Shape("messages", ("tools", "messages"), "\n", _text_alone(_from_messages))
    if "conversations" in have:
        return Shape("sharegpt", ("tools", "system", "conversations"), "\n", _text_alone(_from_sharegpt))
    if {"prompt", "completion"} <= have:
        columns_read = ("tools", "label", "prompt", "completion")
        return Shape("prompt-completion", columns_read, "", _text_alone(_from_prompt_completion))
    if "instruction" in have and (answers := [name for name in ("output", "response") if name in have]):
        contexts = [name for name in ("input", "context") if name in have][:1]
        read = partial(_from_alpaca, contexts=contexts, answer=answers[0])
        return Shape("alpaca", ("system", "instruction", *contexts, answers[0]), "\n", _text_alone(read))
    if {"question", "answer"} <= have:
        read = partial(_pair, prompts=["question"], completion="answer")
        return Shape("question-answer", ("question", "answer"), "\n", _text_alone(read))
    raise DataError(
        f"unknown shape: {found}; accepted: messages | conversations | prompt + completion | instruction (+ input) + "
        "output or response | question + answer | columns named by prompt_field and completion_field "
        "(--prompt-field, --completion-field)"
    )


def _text_alone(read: Callable[[dict[str, Any]], list[Message]]) -> Callable[[dict[str, Any]], list[Message]]:
    """`read`, of records without images, audio and video, which nothing here passes to a model."""

    def text_alone(row: dict[str, Any]) -> list[Message]:
        if media := [name for name in _MEDIA if row.get(name)]:
            raise DataError(f"column {media[0]!r} is not empty; accepted: records of text alone")
        messages = read(row)
        for number, message in enumerate(messages, 1):
            if message["role"] == "user" and (found := _PLACEHOLDER.match(message.get("content") or "")):
                raise DataError(f"message {number} has the placeholder <{found[1] or found[2]}>; accepted: text alone")
        return messages

    return text_alone


def tools_of(row: dict[str, Any]) -> list[Any] | None:
    """The tools that a record declares, in its column ``tools``: a list, or one as JSON text."""
    return _parsed(_without_none(row.get("tools")), "column 'tools'", list) or None


def _without_none(value: Any) -> Any:
    """Parquet fills absent keys with None, which templates would print."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _parsed(value: Any, what: str, *kinds: type) -> Any:
    """`value`, or what it is the JSON text of."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError as error:
            raise DataError(f"{what} is no JSON: {error}") from None
    if value and not isinstance(value, kinds):
        raise DataError(f"{what} is a {type(value).__name__}; accepted: {' or '.join(kind.__name__ for kind in kinds)}")
    return value


def _text(row: dict[str, Any], column: str, *, answer: bool = False, optional: bool = False) -> str:
    """The text of one column; numbers are taken as they print, since answers often are numbers."""
    value = row.get(column)
    if optional and value is None:
        return ""
    missing = value is None or (isinstance(value, str) and not value.strip())
    if answer and missing:
        raise DataError(f"no answer: column {column!r} is {'empty' if isinstance(value, str) else 'missing'}")
    if value is None:
        raise DataError(f"column {column!r} is missing")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise DataError(f"column {column!r} must be text, not {type(value).__name__}")
    return value


def _pair(row: dict[str, Any], prompts: list[str], completion: str) -> list[Message]:
    """The text of the prompt's columns, those that are not empty, and the answer."""
    texts = [_text(row, prompt, optional=len(prompts) > 1) for prompt in prompts]
    return [
        {"role": "user", "content": "\n\n".join([text for text in texts if text.strip()] or texts[:1])},
        {"role": "assistant", "content": _text(row, completion, answer=True)},
    ]


def _from_prompt_completion(row: dict[str, Any]) -> list[Message]:
    if row.get("label") is False:
        raise LeftOutError("'label' is false: an answer that is not wanted")
    if isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list):
        return _checked([*_messages_of(row, "prompt"), *_messages_of(row, "completion")])
    return _pair(row, ["prompt"], "completion")


def _from_alpaca(row: dict[str, Any], contexts: Sequence[str], answer: str) -> list[Message]:
    _text(row, "instruction")
    return [*_system(row), *_pair(row, ["instruction", *contexts], answer)]


def _system(row: dict[str, Any]) -> list[Message]:
    system = _text(row, "system", optional=True)
    return [{"role": "system", "content": system}] if system.strip() else []


def _from_messages(row: dict[str, Any]) -> list[Message]:
    return _checked(_messages_of(row, "messages"))


def _from_sharegpt(row: dict[str, Any]) -> list[Message]:
    messages, turns = _system(row), _turns(row, "conversations")
    if turns and "from" not in turns[0]:
        return _checked([*messages, *_messages_of(row, "conversations")])
    for number, turn in enumerate(turns, 1):
        sender, value = turn.get("from"), turn.get("value")
        role = _SHAREGPT_ROLES.get(sender) if isinstance(sender, str) else None
        if role is None:
            raise DataError(f"turn {number} is from {sender!r}; accepted: {', '.join(_SHAREGPT_ROLES)}")
        if sender == "function_call":
            calls = _parsed(value, f"the function call of turn {number}", dict, list)
            calls = [{"function": call} for call in (calls if isinstance(calls, list) else [calls])]
            messages.append({"role": role, "content": "", "tool_calls": _calls(calls, number)})
        elif isinstance(value, str):
            messages.append({"role": role, "content": value})
        else:
            raise DataError(f"turn {number}: 'value' must be text, not {type(value).__name__}")
    return _checked(messages)


def _calls(calls: Any, number: int) -> list[Any]:
    """Tool calls with their arguments as templates expect them: OpenAI has these as JSON text."""
    try:
        return [
            {"type": "function"}
            | call
            | {
                "function": call["function"]
                | {
                    "name": str(call["function"]["name"]),
                    "arguments": _parsed(
                        call["function"].get("arguments") or {}, f"message {number}: the arguments of a tool call", dict
                    ),
                }
            }
            for call in calls
        ]
    except (KeyError, TypeError, AttributeError):
        raise DataError(f"message {number}: a tool call must have a function with a name and arguments") from None


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
        turn = _without_none(turn)
        if turn.get("role") not in _MESSAGE_ROLES:
            raise DataError(f"message {number} has role {turn.get('role')!r}; accepted: {', '.join(_MESSAGE_ROLES)}")
        if turn.get("weight", 1) not in (0, 1):
            raise DataError(f"message {number} has weight {turn['weight']!r}; accepted: 0, 1")
        content = turn.get("content")
        if isinstance(content, list):
            kinds = [part.get("type") if isinstance(part, dict) else type(part).__name__ for part in content]
            if unknown := [kind for kind in kinds if kind != "text"]:
                raise DataError(f"message {number} has a content part of type {unknown[0]!r}; accepted: 'text'")
            turn["content"] = content = "".join(str(part.get("text", "")) for part in content)
        if not isinstance(content, str) and not (content is None and turn.get("tool_calls")):
            raise DataError(f"message {number}: 'content' must be text, not {type(content).__name__}")
        if turn.get("tool_calls"):
            turn |= {"content": content or "", "tool_calls": _calls(turn["tool_calls"], number)}
        messages.append(turn)
    return messages


def is_trained(message: Message) -> bool:
    """Whether it is an answer, and not one that OpenAI's ``weight: 0`` takes out of the training."""
    return message["role"] == "assistant" and message.get("weight") != 0


def _checked(messages: list[Message]) -> list[Message]:
    """Messages cut after their last answer; what follows an answer teaches nothing."""
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise DataError("no answer: no message of the assistant")
    trained = [i for i in answers if is_trained(messages[i])]
    if not trained:
        raise LeftOutError("every answer has weight 0")
    if not any((messages[i].get("content") or "").strip() or messages[i].get("tool_calls") for i in trained):
        raise DataError("no answer: every message of the assistant is empty")
    return messages[: trained[-1] + 1]
