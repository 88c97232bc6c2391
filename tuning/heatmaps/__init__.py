"""Pictures of a sweep: what `python -m tuning.heatmap` draws.

| file | holds |
| --- | --- |
| `cells.py` | points as tables of cells: two parameters across, the best over the others |
| `words.py` | best point, gain with its interval, which parameter matters how much |
| `figure.py` | PNG and SVG through matplotlib |
| `page.py`, `page.html` | one interactive page a file of records, self-contained |
"""
