"""A browser, a page in it that is watched while a test looks at it, and a run with its report."""

import shutil
from pathlib import Path

import pytest

from qtuning_kernels.report import build_report
from tests.synthetic_run import synthetic_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")

FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
NO_WEBGL = """
const original = HTMLCanvasElement.prototype.getContext;
HTMLCanvasElement.prototype.getContext = function (kind, ...rest) {
  return kind.includes("webgl") ? null : original.call(this, kind, ...rest);
};
"""


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = synthetic_run(tmp_path_factory.mktemp("run"))
    build_report(folder)
    return folder


@pytest.fixture
def open_report(browser):
    """Opens a page and, when the test ends, fails it for a console error or a request to anywhere."""
    contexts, complaints = [], []

    def open_page(path: Path, *, viewport=DESKTOP, scheme="light", script=None, **options):
        context = browser.new_context(viewport=viewport, color_scheme=scheme, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: message.type == "error" and complaints.append(message.text))
        page.on("request", lambda request: _check(request.url, path, complaints))
        if script:
            page.add_init_script(script)
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready]", timeout=60_000)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def _check(url, path, complaints):
    if url != path.as_uri() and not url.startswith(("data:", "blob:")):
        complaints.append(f"request to {url}")
