"""One interactive page for a file of records: its points as JSON in a page that needs nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gpt2_tvm.files import write_atomically
from tuning.heatmaps.words import findings, paragraph
from tuning.records import Records

TEMPLATE = Path(__file__).with_name("page.html")
FOLLOW_S = 5  # how often a page of a running sweep loads itself again


def data_of(records: Records, peak_gb_s: float | None) -> dict[str, Any]:
    """What the page draws from."""
    header = records.header
    measured = header["method"] != "static"
    products = []
    for name, workload in records.workloads.items():
        points, stock = records.of(name), records.stock(name)
        found = findings(points, stock)
        products.append(
            {
                "name": name,
                "calls": workload.calls,
                "bytes": workload.bytes,
                "words": paragraph(found, measured) if found else "No point has run yet.",
                "stock": stock.config.to_json() if stock else None,
                "points": [
                    {
                        "config": p.config.to_json(),
                        "status": p.status,
                        "time_us": p.time_us,
                        "time_us_sd": p.time_us_sd,
                        "samples": p.samples,
                        "gb_s": p.gb_s,
                        "decode_tok_s": p.decode_tok_s,
                        "detail": p.detail,
                        "space": p.space,
                    }
                    for p in points
                ],
            }
        )
    keys = ("device", "date", "method", "target", "model", "quantization", "tvm", "software", "launch_floor_us")
    return {"header": {k: header.get(k) for k in keys}, "peak_gb_s": peak_gb_s, "products": products}


def write_page(records: Records, path: Path, peak_gb_s: float | None = None, follow: bool = False) -> None:
    """Write the page. follow: it loads itself again every few seconds, for a sweep that is still running."""
    text = TEMPLATE.read_text(encoding="utf-8")
    # "</" would end the script element that the data stands in
    data = json.dumps(data_of(records, peak_gb_s), ensure_ascii=False).replace("</", "<\\/")
    refresh = f'<meta http-equiv="refresh" content="{FOLLOW_S}">' if follow else ""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.replace("<!--REFRESH-->", refresh).replace("/*DATA*/null", data))
