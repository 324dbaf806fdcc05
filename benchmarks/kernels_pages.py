"""What `kernels.py` measured, as results/kernels_*.png and the tables of docs/benchmarks.md."""

from benchmarks.common import RESULTS, markdown, read_rows


def plot(clock: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tokens = "512" if clock == "cpu" else "2048"
    rows = [row for row in read_rows(RESULTS / "kernels.csv") if row["v"] == "49152"]
    rows = [row for row in rows if (row["clock"], row["n"]) in ((clock, tokens), ("", "2048"))]
    panels = ["forward", "forward_backward", "backward", "linear_stats", "linear_loss", "linear_loss_memory"]
    figure, axes = plt.subplots(2, 3, figsize=(15, 8))
    for axis, group in zip(axes.flat, panels, strict=True):
        mine = [row for row in rows if row["group"] == group]
        names = list(dict.fromkeys(row["what"] for row in mine))
        field = "peak_mib" if group.endswith("memory") else "median_ms"
        for offset, dtype in enumerate(("float32", "bfloat16")):
            values = {row["what"]: row for row in mine if row["dtype"] == dtype}
            heights = [float(values[name][field]) if name in values else 0.0 for name in names]
            errors = None
            if field == "median_ms":
                errors = [
                    [
                        abs(float(values[name][field]) - float(values[name][edge])) if name in values else 0.0
                        for name in names
                    ]
                    for edge in ("q1_ms", "q3_ms")
                ]
            places = [index + 0.4 * offset for index in range(len(names))]
            bars = axis.barh(places, heights, 0.38, xerr=errors, label=dtype, color=("#0072B2", "#E69F00")[offset])
            axis.bar_label(
                bars, [(f"{x:.3g}" if x < 100 else f"{x:.0f}") if x else "" for x in heights], padding=4, fontsize=8
            )
        if not mine:
            continue
        axis.set_yticks([index + 0.2 for index in range(len(names))], names)
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlabel("MiB above the inputs" if field == "peak_mib" else "ms, median and quartiles")
        axis.set_title(group)
    axes.flat[0].legend(frameon=False)
    machine = rows[0]["machine"] if rows else ""
    figure.suptitle(f"N = {tokens} (memory: 2048), H = 576, V = 49152, {clock} time; {machine}")
    figure.tight_layout()
    figure.savefig(RESULTS / f"kernels_{clock}.png", dpi=110)


def tables() -> dict[str, str]:
    """The tables of docs/benchmarks.md: every stored row, and its ratio to the native kernel's of its group."""
    parts = {}
    for clock, name in (("wall", "kernels wall"), ("cpu", "kernels cpu"), ("", "kernels memory")):
        field = "median_ms" if clock else "peak_mib"
        rows = [row for row in read_rows(RESULTS / "kernels.csv") if row["clock"] == clock]
        native = {}
        for row in rows:
            native.setdefault((row["group"], row["n"], row["v"], row["dtype"]), float(row[field]))
        lines = []
        for row in rows:
            ratio = float(row[field]) / native[row["group"], row["n"], row["v"], row["dtype"]]
            spread_ = f" ({float(row['q1_ms']):.1f}–{float(row['q3_ms']):.1f})" if clock else ""
            shape = [row["group"], row["n"], row["v"], row["dtype"]]
            lines.append([*shape, row["what"], f"{float(row[field]):.1f}{spread_}", f"{ratio:.2f}"])
        unit = "median ms (quartiles)" if clock else "peak MiB above the inputs"
        parts[name] = markdown(["group", "N", "V", "dtype", "what", unit, "over the group's first"], lines)
    return parts
