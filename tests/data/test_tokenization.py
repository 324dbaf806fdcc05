"""Training samples: every shape gives the same tokens, labels cover answers alone, cuts leave an answer."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtuning_kernels.data.sources import DataError, Records
from qtuning_kernels.data.tokenization import load_sft_dataset, tokenize_records
from qtuning_kernels.kernels.contract import IGNORE_INDEX
from tests.tiny_tokenizer import SMOLLM2_TEMPLATE, byte_tokenizer

SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
USER, ANSWER = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n", "4<|im_end|>"

# a template whose generation prompt opens a block that written answers lack, and that trims what it is given
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
    "{{ m['content'] | trim + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
STRICT = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
FORGETFUL = "{{ messages[-1]['content'] }}{% if add_generation_prompt %}{{ '>' }}{% endif %}"


def records(*rows):
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return Records("test", columns, list(rows), [f"test.jsonl:{i}" for i in range(1, len(rows) + 1)])


def tokenize(*rows, tokenizer=None, **kwargs):
    return tokenize_records(records(*rows), tokenizer or byte_tokenizer(), **kwargs)


def texts(sample, tokenizer=None):
    """(the whole text, the labelled text)"""
    tokenizer = tokenizer or byte_tokenizer()
    labelled = [label for label in sample["labels"] if label != IGNORE_INDEX]
    return tokenizer.decode(sample["input_ids"]), tokenizer.decode(labelled)


def chat(*turns):
    return [{"role": role, "content": content} for role, content in turns]


SHAPES = {
    "messages": {"messages": chat(("user", "2+2?"), ("assistant", "4"))},
    "messages, parts": {"messages": chat(("user", [{"type": "text", "text": "2+2?"}]), ("assistant", "4"))},
    "messages, Parquet's None": {"messages": [m | {"name": None} for m in chat(("user", "2+2?"), ("assistant", "4"))]},
    "messages, question behind": {"messages": chat(("user", "2+2?"), ("assistant", "4"), ("user", "thanks"))},
    "sharegpt": {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
    "sharegpt, roles": {"conversations": chat(("user", "2+2?"), ("assistant", "4"))},
    "prompt-completion": {"prompt": "2+2?", "completion": "4"},
    "prompt-completion, number": {"prompt": "2+2?", "completion": 4},
    "prompt-completion, messages": {"prompt": chat(("user", "2+2?")), "completion": chat(("assistant", "4"))},
    "alpaca": {"instruction": "2+2?", "input": "", "output": "4"},
    "alpaca, no input": {"instruction": "2+2?", "output": "4"},
    "alpaca, response": {"instruction": "2+2?", "context": None, "response": "4"},
    "question-answer": {"question": "2+2?", "answer": "4"},
    "messages, weight 1": {"messages": [m | {"weight": 1} for m in chat(("user", "2+2?"), ("assistant", "4"))]},
    "prompt-completion, wanted": {"prompt": "2+2?", "completion": "4", "label": True},
}


@pytest.mark.parametrize(("name", "row"), SHAPES.items(), ids=SHAPES.keys())
def test_every_shape_gives_the_same_sample(name, row):
    dataset, report = tokenize(row | {"id": 7})
    assert texts(dataset[0]) == (SYSTEM + USER + ANSWER, ANSWER)
    assert report.shape == name.split(",")[0]
    assert "id" in report.unused_columns
    assert (report.read, report.skipped, report.truncated) == (1, 0, 0)
    assert (report.tokens, report.answer_tokens) == (len(dataset[0]["input_ids"]), 2)


def test_columns_and_types():
    dataset, _ = tokenize({"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"})
    assert dataset.column_names == ["input_ids", "labels", "sample_id"]
    assert dataset["sample_id"][:] == [0, 1]
    assert dataset.features["sample_id"].dtype == "int64"
    for sample in dataset:
        assert all(
            label in (IGNORE_INDEX, token) for token, label in zip(sample["input_ids"], sample["labels"], strict=True)
        )


def test_named_columns_win_over_shapes():
    row = {"question": "2+2?", "answer": "4", "prompt": "x", "completion": "y"}
    dataset, report = tokenize(row, prompt_field="question", completion_field="answer")
    assert texts(dataset[0])[0] == SYSTEM + USER + ANSWER
    assert report.shape == "named columns"
    assert report.unused_columns == ("prompt", "completion")


def test_alpaca_input_and_system_are_used():
    row = {"system": "Be brief.", "instruction": "Add.", "input": "2+2", "output": "4"}
    text, _ = texts(tokenize(row)[0][0])
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nAdd.\n\n2+2<|im_end|>")


CONVERSATION = chat(("system", "S"), ("user", "u1"), ("assistant", "a1"), ("user", "u2"), ("assistant", " a2 "))


def test_every_answer_of_a_conversation_is_labelled():
    text, labelled = texts(tokenize({"messages": CONVERSATION})[0][0])
    assert labelled == "a1<|im_end|> a2 <|im_end|>"
    assert text.endswith("<|im_start|>assistant\n a2 <|im_end|>")


def test_template_that_rewrites_answers():
    """The last answer is written with a block that earlier ones lack; both are found all the same."""
    tokenizer = byte_tokenizer(THINKING)
    text, labelled = texts(tokenize({"messages": CONVERSATION}, tokenizer=tokenizer)[0][0])
    assert text.count("<think>") == 1
    assert labelled == "a1<|im_end|></think>a2<|im_end|>"


def test_generation_marks_are_not_needed_and_do_no_harm():
    marked = SMOLLM2_TEMPLATE.replace(
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}",
        "{{'<|im_start|>' + message['role'] + '\n'}}{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] }}{% endgeneration %}"
        "{% else %}{{ message['content'] }}{% endif %}"
        "{{ '<|im_end|>' + '\n'}}",
    )
    plain = tokenize({"messages": CONVERSATION})[0][0]
    assert tokenize({"messages": CONVERSATION}, tokenizer=byte_tokenizer(marked))[0][0] == plain


@pytest.mark.parametrize("bos", [False, True])
def test_without_chat_template(bos):
    """Also where the tokenizer itself adds a beginning and an end: the end comes once."""
    tokenizer = byte_tokenizer(None, bos=bos)
    sample = tokenize({"prompt": "ab", "completion": "cd"}, tokenizer=tokenizer)[0][0]
    assert texts(sample, tokenizer) == ("<|im_start|>" * bos + "abcd<|im_end|>", "cd<|im_end|>")
    assert sample["labels"][: 2 + bos] == [IGNORE_INDEX] * (2 + bos)


def test_without_chat_template_conversations_are_joined():
    tokenizer = byte_tokenizer(None)
    text, labelled = texts(tokenize({"messages": CONVERSATION}, tokenizer=tokenizer)[0][0], tokenizer)
    assert text == "S\nu1\na1<|im_end|>\nu2\n a2 <|im_end|>"
    assert labelled == "a1<|im_end|> a2 <|im_end|>"


def test_a_token_across_the_border_belongs_to_the_answer():
    tokenizer = byte_tokenizer(None, merges=("bc",))
    sample = tokenize({"prompt": "ab", "completion": "cd"}, tokenizer=tokenizer)[0][0]
    assert tokenizer.convert_ids_to_tokens(sample["input_ids"]) == ["a", "bc", "d", "<|im_end|>"]
    assert texts(sample, tokenizer)[1] == "bcd<|im_end|>"


def test_an_empty_prompt_leaves_the_first_token_unlabelled():
    """Nothing predicts a first token, and the trainer's shift would drop it without a word."""
    tokenizer = byte_tokenizer(None)
    sample = tokenize({"prompt": "", "completion": "cd"}, tokenizer=tokenizer)[0][0]
    assert texts(sample, tokenizer) == ("cd<|im_end|>", "d<|im_end|>")


@given(
    prompt=st.integers(0, 40),
    answers=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    cutoff=st.integers(2, 60),
)
def test_truncation_always_leaves_an_answer(prompt, answers, cutoff):
    tokenizer = byte_tokenizer(None)
    turns = [turn for n in answers for turn in (("user", "p" * prompt), ("assistant", "a" * n))]
    full = tokenize({"messages": chat(*turns)}, tokenizer=tokenizer, cutoff=10_000)[0][0]
    dataset, report = tokenize({"messages": chat(*turns)}, tokenizer=tokenizer, cutoff=cutoff)
    ids, labels = dataset[0]["input_ids"], dataset[0]["labels"]
    assert len(ids) == min(len(full["input_ids"]), cutoff)
    assert report.truncated == (len(full["input_ids"]) > cutoff)
    assert labels[0] == IGNORE_INDEX
    assert any(label != IGNORE_INDEX for label in labels)
    # what is left is a window of the whole sample
    starts = range(len(full["input_ids"]) - len(ids) + 1)
    assert any(
        full["input_ids"][s : s + len(ids)] == ids and full["labels"][s + 1 : s + len(ids)] == labels[1:]
        for s in starts
    )


def test_truncation_cuts_the_end_unless_the_prompt_is_long():
    tokenizer = byte_tokenizer(None)
    short = tokenize({"prompt": "p" * 10, "completion": "a" * 90}, tokenizer=tokenizer, cutoff=40)[0][0]
    assert texts(short, tokenizer)[0] == "p" * 10 + "a" * 30
    long = tokenize({"prompt": "p" * 100, "completion": "a" * 90}, tokenizer=tokenizer, cutoff=40)[0][0]
    assert texts(long, tokenizer)[0] == "p" * 20 + "a" * 20
    brief = tokenize({"prompt": "p" * 100, "completion": "aaa"}, tokenizer=tokenizer, cutoff=40)[0][0]
    assert texts(brief, tokenizer)[0] == "p" * 36 + "aaa<|im_end|>"


GOOD = {"prompt": "a", "completion": "b"}
WITHOUT_ANSWER = {
    "absent": ({"prompt": "a"}, "column 'completion' is missing"),
    "null": ({"prompt": "a", "completion": None}, "column 'completion' is missing"),
    "empty": ({"prompt": "a", "completion": " \n"}, "column 'completion' is empty"),
}


@pytest.mark.parametrize(("row", "reason"), WITHOUT_ANSWER.values(), ids=WITHOUT_ANSWER.keys())
def test_record_without_an_answer(row, reason):
    with pytest.raises(DataError, match=f"test.jsonl:2: no answer: {reason}"):
        tokenize(GOOD, row, GOOD)
    dataset, report = tokenize(GOOD, row, GOOD, skip_unusable=True)
    assert dataset["sample_id"][:] == [0, 2]
    assert (report.read, report.skipped) == (3, 1)
    assert report.skipped_examples == [f"test.jsonl:2: no answer: {reason}"]
    assert "1 skipped" in str(report)
    assert "test.jsonl:2" in str(report)


BAD_RECORDS = {
    "no assistant": ({"messages": chat(("user", "a"))}, "no answer: no message of the assistant"),
    "empty assistant": (
        {"messages": chat(("user", "a"), ("assistant", ""))},
        "every message of the assistant is",
    ),
    "role": ({"messages": chat(("bystander", "a"))}, "message 1 has role 'bystander'; accepted: system"),
    "content": ({"messages": chat(("user", 3))}, "message 1: 'content' must be text, not int"),
    "not messages": ({"messages": "hello"}, "column 'messages' must be a list of messages"),
    "null messages": ({"messages": None}, "column 'messages' is missing"),
    "sharegpt role": (
        {"conversations": [{"from": "cat", "value": "a"}]},
        "turn 1 is from 'cat'; accepted: system",
    ),
    "sharegpt sender": (  # which no dictionary can look up: "unhashable type: 'list'" without a check
        {"conversations": [{"from": ["cat"], "value": "a"}]},
        r"turn 1 is from \['cat'\]; accepted: system",
    ),
    "sharegpt value": ({"conversations": [{"from": "human"}]}, "turn 1: 'value' must be text, not NoneType"),
    "no prompt": ({"prompt": None, "completion": "b"}, "column 'prompt' is missing"),
    "wrong type": ({"prompt": "a", "completion": ["b"]}, "column 'completion' must be text, not list"),
    "surrogate": ({"prompt": "a", "completion": json.loads(r'"\ud83d"')}, "not valid Unicode text"),
}


@pytest.mark.parametrize(("row", "reason"), BAD_RECORDS.values(), ids=BAD_RECORDS.keys())
def test_bad_records_name_their_line(row, reason):
    with pytest.raises(DataError, match=f"^test.jsonl:1: .*{reason}"):
        tokenize(row)


@pytest.mark.parametrize(
    ("template", "reason"),
    [(STRICT, "chat template refuses it: no system role"), (FORGETFUL, "chat template rewrites earlier")],
)
def test_templates_that_cannot_serve(template, reason):
    with pytest.raises(DataError, match=f"^test.jsonl:1: .*{reason}"):
        tokenize({"messages": CONVERSATION}, tokenizer=byte_tokenizer(template))


def test_unknown_shape_lists_the_columns():
    with pytest.raises(DataError, match=r"unknown shape: columns found: query, answer; accepted: messages"):
        tokenize({"query": "2+2?", "answer": "4"})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"prompt_field": "q", "completion_field": "completion"},
            "prompt_field='q' is not a column; columns found",
        ),
        ({"prompt_field": "prompt", "completion_field": "a"}, "completion_field='a' is not a column"),
        ({"prompt_field": "prompt"}, "go together"),
    ],
)
def test_named_columns_that_are_not_there(fields, message):
    with pytest.raises(DataError, match=message):
        tokenize(GOOD, **fields)


def test_cutoff_below_two():
    with pytest.raises(ValueError, match="cutoff=1 must be at least 2"):
        tokenize(GOOD, cutoff=1)


def test_nothing_left():
    with pytest.raises(DataError, match=r"no record has an answer token; test.jsonl:1"):
        tokenize({"prompt": "a", "completion": ""}, skip_unusable=True)


def test_from_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + json.dumps({"prompt": "a"}) + "\n")
    with pytest.raises(DataError, match=f"^{path}:3: no answer"):
        load_sft_dataset(path, byte_tokenizer())
    dataset, _ = load_sft_dataset(path, byte_tokenizer(), skip_unusable=True)
    assert len(dataset) == 1


def test_more_records_than_one_batch():
    dataset, report = tokenize(*[{"prompt": "a", "completion": str(i)} for i in range(2100)])
    assert dataset["sample_id"][:] == list(range(2100))
    assert texts(dataset[2099])[1] == "2099<|im_end|>"
    assert report.read == 2100


# writes tools and tool calls, as templates of models that have them do
TOOLS = (
    "{% if tools %}{{ 'tools: ' + tools | tojson + '\n' }}{% endif %}{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + (m['content'] or '') }}{% for call in m['tool_calls'] or [] %}"
    "{{ call.function.name + call.function.arguments | tojson }}{% endfor %}{{ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": json.dumps({"a": 2, "b": None})}}
CALLED = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "4", "tool_call_id": "1"},
    {"role": "assistant", "content": "4"},
]
SHAREGPT_CALLED = [
    {"from": "human", "value": "2+2?"},
    {"from": "function_call", "value": json.dumps({"name": "add", "arguments": {"a": 2, "b": None}})},
    {"from": "observation", "value": "4"},
    {"from": "gpt", "value": "4"},
]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CALLED, "tools": [ADD]},
        {"messages": CALLED, "tools": json.dumps([ADD])},
        {"conversations": SHAREGPT_CALLED, "tools": json.dumps([ADD])},
        # Parquet's union of the keys of all messages
        {"messages": [{"content": None, "tool_calls": None, "tool_call_id": None} | m for m in CALLED], "tools": [ADD]},
    ],
    ids=["openai", "openai, text", "sharegpt", "parquet"],
)
def test_tool_calls_and_tools_reach_the_template(row):
    tokenizer = byte_tokenizer(TOOLS)
    text, labelled = texts(tokenize(row, tokenizer=tokenizer)[0][0])
    assert text.startswith(f"tools: {json.dumps([ADD])}\n<|im_start|>user\n2+2?")
    assert labelled == 'add{"a": 2, "b": null}<|im_end|>4<|im_end|>'


UNUSABLE = {
    "image column": ({"images": ["a.png"], **GOOD}, "column 'images' is not empty; accepted: records of text alone"),
    "placeholder": (
        {"conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat"}]},
        "message 1 has the placeholder <image>",
    ),
    "audio column": ({"audio": {"path": "a.wav"}, **GOOD}, "column 'audio' is not empty"),
    "video column": ({"videos": ["a.mp4"], **GOOD}, "column 'videos' is not empty"),
    "placeholder of a sound": ({"prompt": "<audio>What is said?", "completion": "b"}, "has the placeholder <audio>"),
    "placeholder at the end": ({"prompt": "What is shown?\n<video>", "completion": "b"}, "has the placeholder <video>"),
    "image part": (
        {"messages": chat(("user", [{"type": "image_url", "image_url": {"url": "x"}}]), ("assistant", "4"))},
        "message 1 has a content part of type 'image_url'; accepted: 'text'",
    ),
    "dropped call": ({"messages": CALLED}, "the model's chat template drops the tool 'add'"),
    "dropped call of a tool that the question names": (
        {"messages": [{"role": "user", "content": "Please add 2 and 2."}, *CALLED[1:]]},
        "the model's chat template drops the tool 'add'",
    ),
    "dropped tools": (
        {"messages": chat(("user", "q"), ("assistant", "a")), "tools": [ADD]},
        "the model's chat template drops the tool 'add'",
    ),
    "broken call": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "add(2)"}]},
        "the function call of turn 2 is no JSON",
    ),
    "half a weight": ({"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}, "has weight 0.5"),
}


@pytest.mark.parametrize(("row", "message"), UNUSABLE.values(), ids=UNUSABLE.keys())
def test_what_cannot_be_trained_on_as_meant_is_refused_or_counted(row, message):
    good = {"messages": chat(("user", "a"), ("assistant", "b"))} if "messages" in row else GOOD
    good = (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
        if ("conversations" in row)
        else good
    )
    with pytest.raises(DataError, match=f"test.jsonl:2: .*{re.escape(message)}.*--skip-unusable"):
        tokenize(good, row)
    dataset, report = tokenize(good, row, skip_unusable=True)
    assert dataset["sample_id"][:] == [0]
    assert (report.read, report.skipped) == (2, 1)


def test_text_about_media_is_text():
    html = {"prompt": "<video>\n<source src=a>\n</video>", "completion": "Use <image>"}
    assert "<video>" in texts(tokenize(html)[0][0])[0]


def test_answers_that_are_not_wanted_are_left_out_and_counted():
    turns = [m | {"weight": w} for m, w in zip(CONVERSATION, (None, None, 0, None, 1), strict=True)]
    dataset, report = tokenize({"messages": turns}, {"messages": [m | {"weight": 0} for m in CONVERSATION]})
    text, labelled = texts(dataset[0])
    assert labelled == " a2 <|im_end|>"
    assert "a1<|im_end|>" in text
    assert (len(dataset), report.skipped, report.untrained_answers) == (1, 1, 1)
    assert "1 answers have weight 0 and are not trained on" in str(report)
    kto = [GOOD | {"label": True}, GOOD | {"label": False}]
    dataset, report = tokenize(*kto)
    assert dataset["sample_id"][:] == [0]
    assert report.skipped_examples == ["test.jsonl:2: 'label' is false: an answer that is not wanted"]


@pytest.mark.parametrize("template", [None, SMOLLM2_TEMPLATE])
def test_a_special_token_in_the_data_is_text(template):
    """An answer that explains <|im_end|> would teach to end in its middle, and a prompt could open a turn."""
    tokenizer = byte_tokenizer(template, bos=template is None)
    spelled = tokenize({"prompt": "Is <|im_start|> one?", "completion": "No, <|im_end|> is."}, tokenizer=tokenizer)[0][
        0
    ]
    other = tokenize({"prompt": "Is [|im_start|] one?", "completion": "No, [|im_end|] is."}, tokenizer=tokenizer)[0][0]
    brackets = dict(
        zip(
            tokenizer("[]").input_ids[-2 - (template is None) :][:2],
            tokenizer("<>").input_ids[-2 - (template is None) :][:2],
            strict=True,
        )
    )
    for column in ("input_ids", "labels"):
        assert spelled[column] == [brackets.get(token, token) for token in other[column]]
    assert spelled["input_ids"].count(1) == (1 if template is None else 3)  # those that end a turn


def test_several_columns_of_a_prompt():
    row = {"Body": "B", "Note": None, "Question": "Q", "Answer": "A"}
    dataset, report = tokenize(row, prompt_field="Body,Note,Question", completion_field="Answer")
    assert "user\nB\n\nQ<|im_end|>" in texts(dataset[0])[0]
    assert report.columns == ("Body", "Note", "Question", "Answer")
    with pytest.raises(DataError, match="prompt_field='Remark' is not a column"):
        tokenize(row, prompt_field="Body,Remark", completion_field="Answer")


def test_mixed_shapes_name_record_and_shape():
    with pytest.raises(
        DataError, match=r"test.jsonl:2: .*its columns are those of alpaca; this data is read as messages"
    ):
        tokenize({"messages": chat(("user", "a"), ("assistant", "b"))}, {"instruction": "a", "output": "b"})
