"""`qtuning eval`: the accuracy of a model on tasks of lm-evaluation-harness."""

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qtuning_kernels.commands import options
from qtuning_kernels.commands.inputs import load_model, load_tokenizer, model_source
from qtuning_kernels.commands.terminal import quiet_libraries
from qtuning_kernels.files import refuse_overwrite, require, write_atomic


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "eval",
        help="measure accuracy on tasks of lm-evaluation-harness",
        description="Evaluate a model on tasks of lm-evaluation-harness (the extra eval), from YAML files of theirs. "
        "Nothing is fetched where a file names local data, by paths from the current folder.",
        epilog="example: qtuning eval runs/mine/final --tasks sums.yaml --apply-chat-template --output accuracy.json",
    )
    parser.add_argument("model", nargs="?", metavar="[MODEL]", help="folder, or name on the hub; or the embedded one")
    parser.add_argument("--tasks", nargs="+", required=True, metavar="FILE", help="YAML files of tasks")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON file to write as well")
    text = "put questions into the model's chat template, as qtuning train does"
    parser.add_argument("--apply-chat-template", action="store_true", help=text)
    text = f"requests {options.DEFAULT_TEXT}"
    parser.add_argument("--batch-size", type=options.above(0), default=8, metavar="N", help=text)
    return parser


def run(arguments: argparse.Namespace) -> None:
    require("qtuning eval", "eval", "lm_eval")
    source = model_source(arguments)
    for task in arguments.tasks:
        if not Path(task).is_file():
            raise FileNotFoundError(f"--tasks {task}: no such file")
    if arguments.output is not None:
        refuse_overwrite(arguments.output, [source, *arguments.tasks])
    import torch
    from lm_eval.utils import make_table

    tokenizer = load_tokenizer(source)
    if arguments.apply_chat_template and tokenizer.chat_template is None:
        raise ValueError(f"--apply-chat-template: the tokenizer of {source} has no chat template")
    model = load_model(source).to("cuda" if torch.cuda.is_available() else "cpu")
    chat = arguments.apply_chat_template
    found = harness_results(
        model, tokenizer, arguments.tasks, arguments.batch_size, apply_chat_template=chat, log_samples=False
    )
    print(make_table(found))
    if arguments.output is not None:
        with write_atomic(arguments.output) as temporary:
            kept = {"model": source, "apply_chat_template": chat}
            kept |= {name: found[name] for name in ("results", "n-samples", "configs")}
            temporary.write_text(json.dumps(kept, indent=2, default=str) + "\n", encoding="utf-8")


def harness_results(
    model: Any, tokenizer: Any, tasks: Sequence[str], batch_size: int = 8, **options: Any
) -> dict[str, Any]:
    """What `lm_eval.simple_evaluate` returns for tasks of YAML files; `options` are its own. It seeds no generator."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    quiet_libraries()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"))
    return simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=list(tasks),
        task_manager=TaskManager(include_defaults=False),
        **seeds,
        **options,
    )
