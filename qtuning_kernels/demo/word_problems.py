"""The embedded data: worked arithmetic word problems with flaws planted among them.

The problems come from ``gsm_symbolic`` of reasoning-gym, seeded, with their step-by-step solutions. Each
record has ``id``, ``question``, ``answer`` and ``planted``, what was done to it:

- ``clean``: nothing;
- ``wrong``: every result in the solution is another number, the final one included;
- ``duplicate``: one of a few problems again and again, behind changing openings;
- ``trivial``: the sum of two digits.
"""

import importlib
import json
import random
import re
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Record = dict[str, Any]

TRAIN_SIZE, EVAL_SIZE = 512, 128
PLANTED_EACH = 64  # of wrong, duplicate and trivial records in the training split
DUPLICATED = 8  # problems that the duplicates repeat

_TRAIN_SEED, _EVAL_SEED, _PLANT_SEED = 20250923, 20260211, 7
_INSTRUCTION = " Give the result as your final answer. Do not include units."
_RESULT = re.compile(r"(=\s*[$€£]?|^#### )(\d[\d,]*(?:\.\d+)?)", re.MULTILINE)
OPENINGS = (
    "Solve this problem. ",
    "Question: ",
    "Please work this out. ",
    "Here is a word problem. ",
    "Show your steps. ",
    "Problem: ",
    "Think about it carefully. ",
    "Find the answer. ",
)


@contextmanager
def _reasoning_gym_in(wheel: Path) -> Iterator[None]:
    """Let ``reasoning_gym.arithmetic.gsm_symbolic`` be imported out of the wheel.

    The packages above it are bare: their own ``__init__`` imports every task there is, and with them eleven
    distributions, one of which has to be compiled.
    """
    loaded = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith("reasoning_gym")}
    for name in ("reasoning_gym", "reasoning_gym.arithmetic", "reasoning_gym.coaching"):
        package = types.ModuleType(name)
        package.__path__ = [f"{wheel}/{name.replace('.', '/')}"]
        sys.modules[name] = package
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.startswith("reasoning_gym")]:
            del sys.modules[name]
        sys.modules.update(loaded)


def _problems(wheel: Path, seed: int, size: int) -> list[Record]:
    """`size` distinct problems whose solution ends in the answer and shows at least one result."""
    with _reasoning_gym_in(wheel):
        module = importlib.import_module("reasoning_gym.arithmetic.gsm_symbolic.gsm_symbolic")
        source = module.GSMSymbolicDataset(module.GSMSymbolicDatasetConfig(seed=seed, size=2 * size))
        found: dict[str, Record] = {}
        for i in range(2 * size):
            entry = source[i]
            question = entry["question"].removesuffix(_INSTRUCTION)
            answer = entry["metadata"]["answer_cot"]
            ends_right = answer.endswith(f"#### {entry['answer']}")
            if ends_right and len(_RESULT.findall(answer)) > 1:
                found.setdefault(question, {"question": question, "answer": answer})
    if len(found) < size:
        raise RuntimeError(f"reasoning-gym gave {len(found)} usable problems of {size}")
    return list(found.values())[:size]


def _other_number(number: str, rng: random.Random) -> str:
    """Another number with the same count of digits, the same comma and point."""
    while True:
        changed = re.sub(r"\d", lambda digit: rng.choice("0123456789"), number)
        if changed != number and changed[0] != "0":
            return changed


def make_word_problems(wheel: Path) -> dict[str, list[Record]]:
    """The ``train`` and ``eval`` records, the same on every machine.

    Args:
        wheel: the reasoning-gym wheel.
    """
    rng = random.Random(_PLANT_SEED)
    clean = _problems(wheel, _TRAIN_SEED, TRAIN_SIZE - 2 * PLANTED_EACH)
    # the problems that are duplicated stay among the clean ones, as they would in a scraped data set
    wrong, clean = clean[:PLANTED_EACH], clean[PLANTED_EACH:]
    train = [record | {"planted": "clean"} for record in clean]
    for record in wrong:
        answer = _RESULT.sub(lambda m: m[1] + _other_number(m[2], rng), record["answer"])
        train.append({"question": record["question"], "answer": answer, "planted": "wrong"})
    for i in range(PLANTED_EACH):
        record, opening = clean[i % DUPLICATED], OPENINGS[i // DUPLICATED % len(OPENINGS)]
        train.append(record | {"question": opening + record["question"], "planted": "duplicate"})
    sums = [(a, b) for a in range(1, 10) for b in range(1, 10)]
    for a, b in rng.sample(sums, PLANTED_EACH):
        answer = f"{a} + {b} = {a + b}\n#### {a + b}"
        train.append({"question": f"What is {a} + {b}?", "answer": answer, "planted": "trivial"})
    rng.shuffle(train)
    seen = {record["question"] for record in train}
    unseen = [r for r in _problems(wheel, _EVAL_SEED, 2 * EVAL_SIZE) if r["question"] not in seen]
    evaluation = [record | {"planted": "clean"} for record in unseen[:EVAL_SIZE]]
    return {
        name: [{"id": i, **record} for i, record in enumerate(records)]
        for name, records in (("train", train), ("eval", evaluation))
    }


def write_json_lines(records: list[Record], path: Path) -> None:
    """One record per line."""
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
