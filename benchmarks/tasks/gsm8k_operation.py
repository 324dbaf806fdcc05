"""The questions of gsm8k_operation.yaml."""

import operator
import re
from typing import Any

QUESTIONS = 96
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
# 3*60 = <<3*60=180>>180, spaces and $ or not
STEP = re.compile(r"(\d+)\s?([-+*/])\s?(\d+)\s?=\s?\$?<<\1\2\3=(\d+)>>\4")


def choices(answer: str) -> dict[str, Any] | None:
    """Of a solution what stands before its first computation, that one and its three alternatives, ``right`` the place
    of the true one; None where the first line has other numbers or more operations."""
    line = answer.partition("\n")[0]
    step = STEP.search(line)
    if step is None or line.count("<<") != 1 or re.search(r"\d", line[: step.start()]):
        return None
    a, sign, b = int(step[1]), step[2], int(step[3])
    if not b or a == b:
        return None
    results = {other: compute(a, b) for other, compute in OPERATIONS.items()}
    steps = [f"{a}{other}{b} = <<{a}{other}{b}={c:g}>>{c:g}" for other, c in results.items()]
    return {"begin": line[: step.start()], "choices": steps, "right": list(OPERATIONS).index(sign)}


def first_steps(docs: Any) -> Any:
    """The first `QUESTIONS` that can be asked, with their choices."""
    asked = docs.filter(lambda doc: choices(doc["answer"]) is not None)
    asked = asked.select(range(min(QUESTIONS, len(asked))))
    return asked.map(lambda doc: choices(doc["answer"]))
