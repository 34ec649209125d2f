"""Throughput that ``visionattn bench`` measured, as a picture."""

from pathlib import Path

from visionattn._files import atomic_write


def throughput_picture(path: Path, rows: list[dict[str, str]]) -> None:
    """Throughput of every model: curves over the size where there are several, bars otherwise; a panel a setting."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["images_per_s"]]
    settings = list(dict.fromkeys((r["task"], r["dtype"], r["compile"], r["batch"], r["device"]) for r in rows))
    if not rows:
        return
    models = list(dict.fromkeys(row["model"] for row in rows))
    sizes = {row["model"]: len({r["size"] for r in rows if r["model"] == row["model"]}) for row in rows}
    curves = max(sizes.values()) > 1
    height = 3.5 if curves else 1.2 + 0.32 * len(models)
    figure = Figure(figsize=(8, height * len(settings)), layout="constrained")
    for axis, setting in zip(figure.subplots(len(settings), squeeze=False)[:, 0], settings, strict=True):
        task, dtype, compiled, batch, device = setting
        chosen = [r for r in rows if (r["task"], r["dtype"], r["compile"], r["batch"], r["device"]) == setting]
        if curves:
            for name in models:
                points = sorted((int(r["size"]), float(r["images_per_s"])) for r in chosen if r["model"] == name)
                if points:
                    axis.loglog(*zip(*points, strict=True), marker="o", label=name)
            ticks = sorted({int(r["size"]) for r in chosen})
            axis.set_xticks(ticks, [str(size) for size in ticks])
            axis.set_xticks([], minor=True)
            axis.set_xlabel("pixels of a side")
            axis.set_ylabel("images / s")
            axis.legend(fontsize=8)
        else:
            bars = {f"{r['model']} ({r['size']} px)": float(r["images_per_s"]) for r in chosen}
            axis.barh(list(bars), list(bars.values()), color="#3b6ea5")
            axis.invert_yaxis()
            axis.set_xlabel("images / s")
        mode = "compiled" if compiled == "True" else "eager"
        axis.set_title(f"{task}, batch {batch}, {dtype}, {mode}: {device}", fontsize=10)
        axis.grid(alpha=0.3)
    atomic_write(path, lambda f: figure.savefig(f, dpi=110, format="png"))
