"""docs/pictures/patterns.png: which key tiles two tiles of queries visit, for each kind of pattern.

python benchmarks/pattern_pictures.py
"""

from pathlib import Path

from visionattn import Cross, Disk, Neighborhood
from visionattn.plots.maps import save
from visionattn.plots.patterns import visits_figure

GRID = (64, 64)
QUERY, KEY = (8, 16), (8, 8)
PANELS = [
    ("Disk(8)", Disk(8)),
    ("Disk(16)", Disk(16)),
    ("Neighborhood(24)", Neighborhood(24)),
    ("Neighborhood(24, stride=8)", Neighborhood(24, stride=8)),
    ("Neighborhood(32, stride=16)", Neighborhood(32, stride=16)),
    ("Neighborhood(9, dilation=2)", Neighborhood(9, dilation=2)),
    ("Neighborhood(24, causal=True)", Neighborhood(24, causal=True)),
    ("Cross(4, 4)", Cross(4, 4)),
]

if __name__ == "__main__":
    title = "64 x 64 tokens: tiles of 8 x 8 keys that two tiles of 8 x 16 queries visit"
    figure = visits_figure([(label, pattern, QUERY, KEY) for label, pattern in PANELS], GRID, title, [(8, 8), (40, 40)])
    save(figure, Path(__file__).resolve().parents[1] / "docs" / "pictures" / "patterns.png")
