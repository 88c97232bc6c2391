"""Heatmaps: the cells, what the words say on data whose answer is known, and the files."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from test_tuning_records import HEADER
from test_tuning_space import workload

from gpt2_tvm.errors import UserError
from gpt2_tvm.schedules.gemv_config import GemvConfig
from tuning.heatmap import file_name
from tuning.heatmaps.cells import table, within_noise
from tuning.heatmaps.figure import MEASURES, draw
from tuning.heatmaps.marks import about_mark, parse_mark
from tuning.heatmaps.page import write_page
from tuning.heatmaps.words import findings, paragraph, variance_shares
from tuning.records import STOCK, Point, Records, read_records

NAME = workload().name


def point(ts: int, tr: int, tile_s: int, time_us: float | None, status: str = "ok", space: str = "schedule1") -> Point:
    gb_s = 100.0 / time_us if time_us else None
    config = GemvConfig(ts, tr, tile_s, 8)
    return Point(NAME, space, config, status if time_us is None else "ok", time_us, 0.2, gb_s, 25)


def grid(noise: float = 0.0) -> list[Point]:
    """TS doubles the time at each step away from 4, TILE_S adds a tenth of that effect, TR does nothing."""
    random = np.random.default_rng(0)
    found = []
    for ts, tr, tile_s in itertools.product((1, 2, 4, 8), (4, 8, 16), (1, 2)):
        log = abs(math.log2(ts / 4)) + 0.1 * tile_s + random.normal(0, noise)
        found.append(point(ts, tr, tile_s, 10 * 2**log))
    return found


def test_a_cell_is_the_best_over_the_other_parameters() -> None:
    points = [
        *grid(),
        point(16, 16, 1, None, "timeout"),
        point(16, 16, 2, None, "crash"),
        point(16, 8, 1, None, "crash"),
    ]
    t = table(points, "TS", "TR")
    assert (t.ys, t.xs) == ((1, 2, 4, 8, 16), (4, 8, 16))
    cells = {(t.ys[i], t.xs[j]): cell for i, j, cell in t.cells()}
    assert cells[4, 8].time_us == min(p.time_us for p in grid() if (p.config.ts, p.config.tr) == (4, 8))
    assert cells[16, 8].failure == "crash" and cells[16, 16].failure in ("timeout", "crash")
    assert cells[16, 4].point is None and cells[16, 4].failure is None  # never tried
    fixed = table(points, "TS", "TR", {"TILE_S": 2})
    assert fixed.xs == t.xs and all(c.point is None or c.point.config.tile_s == 2 for _, _, c in fixed.cells())


def test_shares_of_the_variance() -> None:
    shares, rest = variance_shares(grid())
    assert next(iter(shares)) == "TS" and shares["TS"] > 0.95 and 0 < shares["TILE_S"] < 0.05 and shares["TR"] < 1e-9
    assert rest < 1e-9
    noisy, left = variance_shares(grid(noise=1.0))
    assert left > 0.2 and math.isclose(sum(noisy.values()) + left, 1.0)


def test_words() -> None:
    stock = point(8, 16, 1, 30.0, space=STOCK)
    found = findings(
        [p for p in grid() if p.config != stock.config] + [stock, point(16, 16, 2, None, "timeout")], stock
    )
    assert found is not None and found.best.config.ts == 4 and found.failed == {"timeout": 1}
    assert found.gain == pytest.approx(30 / found.best.time_us)
    assert found.gain_low < found.gain < found.gain_high
    words = paragraph(found)
    assert "times as fast as DLight's point" in words and "TS 9" in words and "Failed: 1 timeout." in words
    assert "DLight's own point" in paragraph(findings([found.best], found.best))
    assert findings([point(16, 16, 2, None, "crash")], None) is None
    close = point(2, 16, 1, found.best.time_us + 0.05)
    assert within_noise(close, found.best) and not within_noise(stock, found.best)


@pytest.fixture
def records(tmp_path: Path) -> Records:
    with Records(tmp_path / "r.jsonl") as store:
        store.open(HEADER)
        store.define([workload()])
        for p in [*grid(), point(8, 32, 1, 55.0, space=STOCK), point(16, 16, 2, None, "timeout")]:
            store.add(p)
    return read_records(tmp_path / "r.jsonl")


@pytest.mark.parametrize("measure", MEASURES)
def test_pictures(records: Records, tmp_path: Path, measure: str) -> None:
    file = tmp_path / "map.png"
    draw(records, NAME, file, measure, peak_gb_s=1000.0)
    assert file.read_bytes().startswith(b"\x89PNG") and len(file.read_bytes()) > 20_000
    text = file.with_suffix(".svg").read_text()
    for words in ("TS x TR at TILE_S=1, TILE_R=8", "TILE_S x TILE_R at", "★", "timeout", "variance of log time"):
        assert words in text.replace("\n", " "), words
    first = file.with_suffix(".svg").read_bytes()
    draw(records, NAME, file, measure, peak_gb_s=1000.0)
    assert file.with_suffix(".svg").read_bytes() == first, "the same records give the same file"


def test_a_marked_point(records: Records, tmp_path: Path) -> None:
    mark = parse_mark("TS=8, TR=16,TILE_S=1,TILE_R=8")
    assert mark == {"TS": 8, "TR": 16, "TILE_S": 1, "TILE_R": 8}
    points = records.of(NAME)
    best = min((p for p in points if p.ok), key=lambda p: p.time_us or 0)
    (chosen,) = (p for p in points if (p.config.ts, p.config.tr, p.config.tile_s) == (8, 16, 1))
    expected = f"{chosen.time_us:.1f} us, {chosen.time_us / best.time_us:.2f} times the best's."
    assert about_mark(points, mark, best) == f"M, TS=8 TR=16 TILE_S=1 TILE_R=8: {expected}"
    assert about_mark(points, {"TS": 16, "TR": 16}, best) == "M, TS=16 TR=16: timeout."
    assert about_mark(points, {"TS": 64}, best) == "M, TS=64: not tried."
    draw(records, NAME, tmp_path / "map.png", mark=mark)
    assert ">M<" in (tmp_path / "map.svg").read_text() and expected in (tmp_path / "map.svg").read_text()
    for wrong in ("TS", "TS=x", "VEC=1", "TS=8,", ""):
        with pytest.raises(UserError, match="say TS=1,TR=1,TILE_S=1,TILE_R=1"):
            parse_mark(wrong)


def test_the_page_holds_every_point_and_needs_no_network(records: Records, tmp_path: Path) -> None:
    page = tmp_path / "index.html"
    write_page(records, page, 4800.0)
    text = page.read_text()
    data = json.loads(re.search(r"const DATA = (.*);\n", text)[1].replace("<\\/", "</"))
    assert len(data["products"][0]["points"]) == len(records.points) and data["peak_gb_s"] == 4800.0
    assert not re.findall(r"(?:src|href)=|https?://(?!www\.w3\.org/2000/svg)", text)
    assert "refresh" not in text.split("</head>")[0].replace("<!--REFRESH-->", "")
    write_page(records, page, follow=True)
    assert 'http-equiv="refresh"' in page.read_text()


def test_names_of_files() -> None:
    assert file_name("logits (wte) 50257x768 float16") == "logits-wte-50257x768-float16"


def test_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no records"):
        read_records(tmp_path / "none.jsonl")
