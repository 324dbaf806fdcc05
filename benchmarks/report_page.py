"""How long the report of a large run takes to be built and, in Chromium, to be ready: every chart drawn.

    python -m benchmarks.report_page

Appends rows to benchmarks/results/report_page.csv. A browser without a GPU draws WebGL in software.
"""

import argparse
import csv
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.common import RESULTS, environment, read_rows

STEPS, POOL, SAMPLES, REPEATS = 782, 64, 50_000, 5


def ready_ms(page: Path, browser, script: str | None) -> float:
    """From the start of the navigation to the mark that the page sets when it is ready."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    opened = context.new_page()
    if script:
        opened.add_init_script(script)
    opened.goto(page.as_uri())
    opened.wait_for_selector("html[data-ready]", timeout=120_000)
    ready = opened.evaluate("Number(document.documentElement.dataset.ready)")
    context.close()
    return ready


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    from playwright.sync_api import sync_playwright

    from qtuning_kernels.report import build_report
    from tests.report.conftest import CHROMIUM, FLAGS, NO_WEBGL
    from tests.synthetic_run import synthetic_run

    rows = []
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        run = synthetic_run(Path(folder), steps=STEPS, pool=POOL, samples=SAMPLES)
        start = time.perf_counter()
        page = build_report(run)
        built = time.perf_counter() - start
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        versions = environment() | {"versions": f"chromium {browser.version}"}
        for drawn, script in {"webgl": None, "svg": NO_WEBGL}.items():
            seconds = [ready_ms(page, browser, script) / 1e3 for _ in range(REPEATS)]
            figures = {"median_s": statistics.median(seconds), "max_s": max(seconds), "build_s": built}
            figures |= {"page_mb": page.stat().st_size / 1e6}
            rows.append({"samples": SAMPLES, "drawn": drawn, "repeats": REPEATS} | figures | versions)
    path = RESULTS / "report_page.csv"
    stored = read_rows(path) if path.exists() else []
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(stored[0] if stored else rows[0]), lineterminator="\n")
        if not stored:
            writer.writeheader()
        for row in rows:
            writer.writerow({name: f"{x:.3f}" if isinstance(x, float) else x for name, x in row.items()})
            print(f"{row['drawn']}: ready after {row['median_s']:.2f} s (at most {row['max_s']:.2f})")


if __name__ == "__main__":
    main()
