"""The page of a comparison, and its pictures side by side."""

import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

PANEL = 768  # pixels of a panel's longer side at most
GAIN = 4  # of the differences
LABEL = 16  # pixels of a line

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1500px; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } th, td { padding: .25em .8em; text-align: right }
th { border-bottom: 1px solid #888 } th:first-child, td:first-child { text-align: left }
.row { display: flex; flex-wrap: wrap; gap: 12px } figure { margin: 0; flex: 1 1 240px; max-width: 480px }
figure img { width: 100%; image-rendering: auto } figcaption { font-size: 13px; color: #444 }
pre { background: #f4f4f4; padding: .8em; overflow-x: auto; font-size: 13px } h2 { font-size: 17px; margin-top: 2em }
"""


def number(value: float | None, digits: int = 2) -> str:
    """For people: a dash where nothing was measured."""
    if value is None:
        return "-"
    return "equal" if math.isinf(value) else f"{value:.{digits}f}"


def cells(entry: dict[str, Any]) -> list[str]:
    """A summary's entry as the table shows it."""
    gain = "" if entry["speedup"] is None else f"{entry['speedup']:.2f} x"
    return [
        entry["method"], str(entry["pictures"]), number(entry["seconds"]), gain,
        number(entry["psnr"]), number(entry["ssim"], 4), number(entry["lpips"], 4),
    ]  # fmt: skip


HEADER = ("method", "pictures", "seconds", "dense / it", "PSNR", "SSIM", "LPIPS")


def page(result: Any) -> str:
    """The comparison as HTML; pictures are links into its folder."""
    escape = html.escape
    facts = ", ".join(f"{k} {v}" for k, v in result.settings.items() if v is not None)
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>dense and sparse</title>",
        f"<style>{_STYLE}</style></head><body><h1>Dense and sparse attention, the same prompts and seeds</h1>",
        f"<p>{escape(facts)}</p>",
    ]
    if result.missing:
        parts.append(f"<p><b>{result.missing} pictures are missing: the run was interrupted or failed.</b></p>")
    parts.append("<table><tr>" + "".join(f"<th>{h}</th>" for h in HEADER) + "</tr>")
    for entry in result.summary():
        parts.append("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in cells(entry)) + "</tr>")
    parts.append(
        "</table><p>Seconds: median of a whole call, text encoding and decoding included; dense / it: median over the "
        "pictures. PSNR in dB, SSIM and LPIPS: means, against the dense picture. They measure how far a picture moved, "
        "not whether it is worse.</p>"
    )
    parts += [f"<p>{escape(note)}</p>" for note in result.notes]
    for prompt, seed in result.pairs():
        parts.append(f"<h2>{escape(prompt)} <small>seed {seed}</small></h2><div class='row'>")
        for row in result.of(prompt, seed):
            parts.append(_figure(row))
        link = escape(side_by_side_name(result, prompt, seed))
        parts.append(f"</div><p><a href='{link}'>side by side, with the differences</a></p>")
    for method in result.methods:
        path = result.report_path(method)
        if path.is_file():
            parts.append(f"<h2>report of {escape(method)}</h2><pre>{escape(path.read_text(encoding='utf-8'))}</pre>")
    return "\n".join([*parts, "</body></html>", ""])


def _figure(row: dict[str, Any]) -> str:
    picture = html.escape(shown(row))
    text = f"{html.escape(row['method'])}, {row['seconds']:.2f} s"
    if row["psnr"] is not None:
        text += f"<br>PSNR {number(row['psnr'])}, SSIM {number(row['ssim'], 4)}, LPIPS {number(row['lpips'], 4)}"
    return (
        f"<figure><a href='{picture}'><img src='{picture}' loading='lazy'></a><figcaption>{text}</figcaption></figure>"
    )


def shown(row: dict[str, Any]) -> str:
    """The picture's name, or the name of a video's frame in the middle."""
    return row["picture"] % (row["frames"] // 2) if row["frames"] > 1 else row["picture"]


def side_by_side_name(result: Any, prompt: str, seed: int) -> str:
    (dense, *_) = result.of(prompt, seed)
    return f"{Path(dense['picture']).parent.as_posix()}/_side-by-side.png"  # no method's file begins so


def side_by_side(panels: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Panels beside each other, the first one's differences to the others below them, times :data:`GAIN`."""
    first = panels[0][1]
    scale = min(1.0, PANEL / max(first.size))
    size = tuple(max(1, round(n * scale)) for n in first.size)
    step = max(size[0], 160) + 8
    canvas = Image.new("RGB", (step * len(panels) - 8, 2 * (size[1] + LABEL) + 4), "white")
    draw = ImageDraw.Draw(canvas)
    for i, (label, image) in enumerate(panels):
        small = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        draw.text((i * step, 1), label, fill="black")
        canvas.paste(small, (i * step, LABEL))
        if i:
            # of the whole pictures: resizing first would average differences away
            distance = np.abs(np.asarray(image.convert("RGB"), np.int16) - np.asarray(first.convert("RGB"), np.int16))
            shown = Image.fromarray((distance * GAIN).clip(0, 255).astype(np.uint8)).resize(size, Image.Resampling.BOX)
            top = size[1] + LABEL + 4
            draw.text((i * step, top + 1), f"difference x {GAIN}", fill="black")
            canvas.paste(shown, (i * step, top + LABEL))
    return canvas
