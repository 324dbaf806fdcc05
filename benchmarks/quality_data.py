"""The data of the quality benchmark: generated tasks or a file, with flaws planted among the training records.

A record has ``question``, ``answer``, ``task`` and ``planted``, one of `KINDS`: what was done to it. The mark stays
with the record, so that it can be counted what a policy kept. Held-out records have no flaws, and are the same for
every seed of the training records.
"""

import random
from collections.abc import Iterable
from typing import Any

from qtuning_kernels.data.sources import Records, read_records
from qtuning_kernels.data.tokenization import tokenize_records
from qtuning_kernels.demo.word_problems import OPENINGS

Record = dict[str, Any]

KINDS = ("clean", "exchanged", "duplicate", "trivial")
CONDITIONS: dict[str, dict[str, float]] = {  # share of the training records
    "clean": {},
    "exchanged20": {"exchanged": 0.2},
    "exchanged40": {"exchanged": 0.4},
    "duplicates50": {"duplicate": 0.5},
    "trivial50": {"trivial": 0.5},
    "mixed": {"exchanged": 0.2, "duplicate": 0.2, "trivial": 0.2},
}
DUPLICATED = 16  # records that the duplicates repeat
HELD_OUT_SEED = 20260211

# of reasoning-gym: short answers of several tokens, which a model of 135 million parameters learns in 60 steps
TASKS: dict[str, dict[str, Any]] = {
    "number_filtering": {"min_numbers": 3, "max_numbers": 6, "max_decimals": 0, "min_value": 0, "max_value": 99},
    "word_sequence_reversal": {"min_words": 3, "max_words": 5},
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    "needle_haystack": {"min_num_statements": 3, "max_num_statements": 4},
}
_BOILERPLATE = (  # instructions that a model which is trained on the answers has no use for
    "Solve the following problem.\n\nProvide you answer as a comma-separated list of words with a space after the "
    "comma.\n\n",
    "State the final answer to the following arithmetic problem: ",
    "\nReturn the new list in the same format.",
    " Reply only with a name.",
)
# as the embedded model's, without its system message of 22 tokens: a third of a short sample
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    "'\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def generated(count: int, seed: int, without: Iterable[Record] = ()) -> list[Record]:
    """`count` records of `TASKS` in equal shares, no question twice and none of those in `without`."""
    import reasoning_gym

    taken = {record["question"] for record in without}
    records = []
    for place, (task, options) in enumerate(TASKS.items()):
        wanted = count // len(TASKS) + (place < count % len(TASKS))
        source = reasoning_gym.create_dataset(task, size=4 * wanted + 64, seed=seed, **options)
        found: dict[str, Record] = {}
        for entry in source:
            question = entry["question"]
            for text in _BOILERPLATE:
                question = question.replace(text, "")
            question = question.strip()
            if question not in taken:
                found.setdefault(question, {"question": question, "answer": str(entry["answer"]), "task": task})
            if len(found) == wanted:
                break
        if len(found) < wanted:
            raise ValueError(f"{task} has {len(found)} distinct questions; {wanted} are wanted")
        records += found.values()
    random.Random(seed).shuffle(records)
    return [record | {"planted": "clean"} for record in records]


def generated_split(train: int, held_out: int, seed: int) -> tuple[list[Record], list[Record]]:
    """Training records of this seed, and the held-out ones of every seed."""
    unseen = generated(held_out, HELD_OUT_SEED)
    return generated(train, seed, unseen), unseen


def file_split(
    data: str, prompt_field: str, completion_field: str, train: int, held_out: int, seed: int
) -> tuple[list[Record], list[Record]]:
    """As `generated_split`, drawn from a file of prompts and completions.

    Raises:
        ValueError: the file lacks one of the fields, or has too few records.
    """
    source = read_records(data)
    for field in (prompt_field, completion_field):
        if field not in source.columns:
            raise ValueError(f"{data} has no field {field!r}; accepted: of {source.columns}")
    found = {}
    for row in source:
        record = {"question": row[prompt_field], "answer": row[completion_field], "task": "file", "planted": "clean"}
        found.setdefault(record["question"], record)
    records = list(found.values())
    if len(records) < train + held_out:
        raise ValueError(f"{data} has {len(records)} distinct prompts; accepted: at least {train} + {held_out}")
    random.Random(HELD_OUT_SEED).shuffle(records)
    rest = records[held_out:]
    random.Random(seed).shuffle(rest)
    return rest[:train], records[:held_out]


def plant(records: list[Record], condition: str, seed: int, result_mark: str = "") -> list[Record]:
    """The records with the flaws of the condition, each at its place.

    Args:
        records: clean ones.
        condition: one of `CONDITIONS`.
        seed: of the choice of records.
        result_mark: what stands before a final result, for trivial records: an answer of the same form.

    Raises:
        ValueError: answers cannot be exchanged, because half of them are the same.
    """
    rng = random.Random(f"{seed} {condition}")
    order = list(range(len(records)))
    rng.shuffle(order)
    planted = list(records)
    chosen = {}
    for kind, share in CONDITIONS[condition].items():
        count = round(share * len(records))
        chosen[kind], order = order[:count], order[count:]
    _exchange(planted, chosen.get("exchanged", []))
    for place, index in enumerate(chosen.get("duplicate", [])):
        record = records[order[place % DUPLICATED]]
        opening = OPENINGS[place // DUPLICATED % len(OPENINGS)]
        planted[index] = record | {"question": opening + record["question"], "planted": "duplicate"}
    for index in chosen.get("trivial", []):
        planted[index] = _trivial(rng, result_mark)
    return planted


def _exchange(records: list[Record], chosen: list[int]) -> None:
    """Gives each chosen record the answer of another one of its task, never the same answer."""
    answers = {}
    for task in {records[index]["task"] for index in chosen}:
        # equal answers lie side by side, so that half of the list further on there is another one
        own = sorted((index for index in chosen if records[index]["task"] == task), key=lambda i: records[i]["answer"])
        answers |= {
            index: records[own[(place + len(own) // 2) % len(own)]]["answer"] for place, index in enumerate(own)
        }
    for index, answer in answers.items():
        if answer == records[index]["answer"]:
            raise ValueError(f"half of the answers of task {records[index]['task']!r} are the same: {answer!r}")
        records[index] = records[index] | {"answer": answer, "planted": "exchanged"}


def _trivial(rng: random.Random, result_mark: str) -> Record:
    a, b = rng.randint(1, 9), rng.randint(1, 9)
    question = rng.choice(("What is {} + {}?", "{} + {} =", "Add {} and {}.", "How much is {} plus {}?")).format(a, b)
    answer = f"{a} + {b} = {a + b}\n{result_mark} {a + b}" if result_mark else f"{a + b}"
    return {"question": question, "answer": answer, "task": "trivial", "planted": "trivial"}


def tokenized(records: list[Record], tokenizer: Any, cutoff: int) -> Any:
    """The samples of `records`; ``sample_id`` is the place in the list."""
    rows = Records("quality", ["question", "answer"], [{k: r[k] for k in ("question", "answer")} for r in records])
    return tokenize_records(rows, tokenizer, prompt_field="question", completion_field="answer", cutoff=cutoff)[0]


def other_text(file: str | None) -> str:
    """Text of another domain, for what is forgotten: of `file`, or a story of 1889 that reasoning-gym brings."""
    if file is not None:
        with open(file, encoding="utf-8") as stream:
            return stream.read()
    from reasoning_gym.data import read_data_file

    return read_data_file("in_the_year_2889.txt")
