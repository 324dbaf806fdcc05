"""Every causal language model type of `transformers`: right, or refused in one line; the table of which and why."""

import csv
import os
import warnings
from pathlib import Path

import pytest
import transformers

from qtuning_kernels.models.causal_lm import CausalLM
from tests.models.tiny_architectures import MODEL_TYPES, tiny_architecture

TABLE = Path(__file__).with_name("architectures.csv")
COLUMNS = ("transformers", "model_type", "verdict", "why")


def verdict(model_type: str) -> tuple[str, str]:
    """``works``, ``refused`` with the message of `CausalLM`, ``fails`` with another's, or ``not built``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = tiny_architecture(model_type)
        except Exception as error:
            return "not built", one_line(error)
        try:
            CausalLM(model).check()
        except ValueError as error:
            return "refused", one_line(error)
        except Exception as error:
            return "fails", one_line(error)
    return "works", ""


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_type_works_or_is_refused():
    """The committed table, made again. QTUNING_WRITE=1 writes it, for another version of `transformers`."""
    found = {model_type: verdict(model_type) for model_type in MODEL_TYPES}
    version = transformers.__version__
    if os.environ.get("QTUNING_WRITE"):
        with TABLE.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(
                [COLUMNS, *((version, model_type, *of_type) for model_type, of_type in found.items())]
            )
    with TABLE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    known = {row["model_type"]: (row["verdict"], row["why"]) for row in rows}
    if rows[0]["transformers"] == version:
        assert {name: what for name, (what, _) in found.items()} == {name: what for name, (what, _) in known.items()}
    else:  # types come and go; none that worked may stop
        assert [n for n, (what, _) in known.items() if what == "works" and found.get(n, ("works",))[0] != "works"] == []
    assert [name for name, (what, _) in found.items() if what == "fails"] == []
