"""The questions of gsm8k_operation.yaml."""

import re
from typing import Any

QUESTIONS = 96
OPERATIONS = "+-*/"
STEP = re.compile(r"(\d+)\s?([-+*/])\s?(\d+)\s?=\s?\$?<<\1\2\3=")  # 3*60 = <<3*60=180>>180, spaces and $ or not


def choices(answer: str) -> dict[str, Any] | None:
    """Of a solution what stands before its first computation, that one and its three alternatives, which differ in one
    sign, ``right`` the place of the true one; None where the first line has other numbers or more computations."""
    line = answer.partition("\n")[0]
    step = STEP.search(line)
    if step is None or line.count("<<") != 1 or re.search(r"\d", line[: step.start()]):
        return None
    return {
        "begin": line[: step.start()],
        "choices": [f"{step[1]}{sign}{step[3]} =" for sign in OPERATIONS],
        "right": OPERATIONS.index(step[2]),
    }


def first_steps(docs: Any) -> Any:
    """The first `QUESTIONS` that can be asked, with their choices."""
    asked = docs.filter(lambda doc: choices(doc["answer"]) is not None)
    asked = asked.select(range(min(QUESTIONS, len(asked))))
    return asked.map(lambda doc: choices(doc["answer"]))
