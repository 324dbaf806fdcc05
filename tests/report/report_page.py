"""Reads a report's page back: its numbers, tags, text and data."""

import base64
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from .report_expected import expected_numbers

DTYPES = {"f4": "<f4", "f8": "<f8", "i1": "<i1", "u1": "<u1", "i2": "<i2", "i4": "<i4"}


class Page(HTMLParser):
    """The report as a reader that trusts nothing sees it: tags, text, numbers and data."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags, self.numbers, self.scripts = [], {}, []
        self._script = None
        self.feed(self.source)
        self.text = re.sub(r"<[^>]+>", " ", re.sub(r"(?s)<(script|style).*?</\1>", " ", self.source))
        self.data = json.loads(next(text for kind, text in self.scripts if kind == "application/json"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if "data-number" in attributes:
            value = json.loads(attributes["data-value"])
            assert self.numbers.setdefault(attributes["data-number"], value) == value
        if tag == "script":
            self._script = attributes.get("type", "")

    def handle_endtag(self, tag):
        if tag == "script":
            self._script = None

    def handle_data(self, data):
        if self._script is not None:
            self.scripts.append((self._script, data))


def columns(packed):
    """The columns of a page's table, of which some are packed."""
    return {name: array(value) if isinstance(value, dict) else value for name, value in packed.items()}


def points(page, frame=0):
    """The rows that the plane shows at one position of the slider: dicts, ``id`` among them."""
    table = columns(page.data["plane"]["columns"])
    step = page.data["plane"]["frames"][frame]["step"]
    chosen = table["last"] == 1 if step is None else table["step"] == step
    rows = [dict(zip(table, row, strict=True)) for row in zip(*(table[name][chosen] for name in table), strict=True)]
    return [row | {"id": page.data["samples"]["id"][row["sample"]]} for row in rows]


def array(value):
    """A Plotly array, plain or in base64."""
    if isinstance(value, dict):
        flat = np.frombuffer(base64.b64decode(value["bdata"]), DTYPES[value["dtype"]])
        return flat.reshape([int(n) for n in value["shape"].split(",")]) if "shape" in value else flat
    return np.array(value, dtype=float)


def assert_numbers(page, folder):
    expected = expected_numbers(folder)
    if expected["loss_eval_first"] is None:
        del expected["loss_eval_first"], expected["loss_eval_last"]  # not shown
    assert set(page.numbers) == set(expected)
    for key, value in expected.items():
        if value is None:
            assert page.numbers[key] is None, key
        else:
            assert page.numbers[key] == pytest.approx(value, rel=1e-9), key
