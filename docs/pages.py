"""Which files the site has, each under its path in the repository (a hook of mkdocs), and how defaults are shown."""

from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PATTERNS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md", "docs/*.png", "benchmarks/results/*.png")
LINKED = ("examples/*.py", "examples/*.yaml", "tests/pruning/test_triage.py", "tests/pruning/authors_numbers.json")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The theme's files, and those of the repository in the place of what mkdocs found in `docs`."""
    paths = sorted(path for pattern in (*PATTERNS, *LINKED) for path in ROOT.glob(pattern))
    here = [File(str(p.relative_to(ROOT)), str(ROOT), config.site_dir, config.use_directory_urls) for p in paths]
    return Files([*(file for file in files if file.src_dir != config.docs_dir), *here])


class Defaults(griffe.Extension):
    """``setting(0.5, check_ratio)`` of `QTuningConfig` as 0.5."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_) -> None:
        if isinstance(attr.value, griffe.ExprCall) and str(attr.value.function) == "setting":
            attr.value = attr.value.arguments[0]
