"""The site of `make docs`: strict, without a network, with every table and every public name."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import qtuning_kernels as qk

ROOT = Path(__file__).parents[1]
# what a browser would load by itself, not what a reader may click on
REQUESTS = re.compile(
    r"<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//[^>]*>|@import[^;]*//[^;]*;"
)
NO_NETWORK = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9") | {
    "NO_MKDOCS_2_WARNING": "1"
}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],  # --quiet counts no warnings
        cwd=ROOT, env=os.environ | NO_NETWORK, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def test_no_page_makes_a_request(site):
    pages = [*site.rglob("*.html"), *site.rglob("*.css")]
    assert len(pages) > 12
    assert [found for page in pages for found in REQUESTS.findall(page.read_text())] == []


def test_every_table_is_one(site):
    """A table right behind a line of text is one on GitHub, and text with bars here."""
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        name = page.relative_to(ROOT).with_suffix("")
        html = (site / ("." if name.name == "README" else name) / "index.html").read_text()
        tables = len(re.findall(r"^\|(?: ?:?-+:? ?\|)+$", page.read_text(), re.MULTILINE))
        assert html.count("<table") >= tables, name
        assert "<p>|" not in html, name


def test_the_reference_has_every_public_name(site):
    html = (site / "docs/api/index.html").read_text()
    assert [name for name in qk.__all__ if f'id="qtuning_kernels.{name}"' not in html] == []
