"""The files that sweeps and tuning.apply write: crash-safe, resumable, refused where they are something else."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from test_tuning_space import workload

from gpt2_tvm.errors import UserError
from gpt2_tvm.schedules.gemv_config import GemvConfig
from gpt2_tvm.schedules.tuned import Tuned, TunedPoint, load_tuned
from tuning.apply import candidate, clearly_faster
from tuning.decode import Gain, Rates
from tuning.records import STOCK, Point, Records, header, read_records

HEADER = header("a GPU", "h200", "timestamps", model="gpt2", quantization="q0f16", batch=1, target_argument="h200")
STOCK_POINT = GemvConfig(16, 32, 1, 8)


def point(ts: int, time_us: float | None, space: str = "schedule1", **more: Any) -> Point:
    status = "ok" if time_us else "crash"
    return Point(workload().name, space, GemvConfig(ts, 16, 1, 8), status, time_us, 0.1, 3.0, 20, **more)


def write(path: Path, *points: Point, head: dict[str, Any] = HEADER, fresh: bool = False) -> None:
    with Records(path) as records:
        records.open(head, fresh)
        records.define([workload()])
        for p in points:
            records.add(p)


def test_points_survive_and_go_on(tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    write(file, point(8, 20.0, extra={"registers": 40}), point(4, None, detail="ended by SIGABRT"))
    write(file, point(2, 30.0))
    found = read_records(file)
    assert [p.config.ts for p in found.ok(workload().name)] == [8, 2]
    assert found.points[workload().name, GemvConfig(8, 16, 1, 8)].extra == {"registers": 40}
    assert [p.detail for p in found if not p.ok] == ["ended by SIGABRT"]
    assert len(file.read_text().splitlines()) == 5  # header, product, three points: nothing is written twice


@pytest.mark.parametrize("cut", [1, 7, 60])
def test_a_torn_last_line_is_mended(tmp_path: Path, cut: int) -> None:
    file = tmp_path / "r.jsonl"
    write(file, point(8, 20.0), point(4, 25.0))
    whole = file.read_bytes()
    file.write_bytes(whole[:-cut])
    assert len(read_records(file).points) == 1
    write(file, point(2, 30.0))
    assert {p.config.ts for p in read_records(file)} == {8, 2}


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [("device", "another", "device"), ("tvm", "0.1", "TVM"), ("target", "t4", "target"), ("batch", 4, "batch")],
)
def test_foreign_records_are_refused_and_kept(tmp_path: Path, key: str, value: Any, word: str) -> None:
    file = tmp_path / "r.jsonl"
    write(file, point(8, 20.0))
    before = file.read_bytes()
    with pytest.raises(UserError, match=f"another {word}.*--fresh"):
        write(file, point(4, 1.0), head={**HEADER, key: value})
    assert file.read_bytes() == before
    write(file, point(4, 1.0), head={**HEADER, key: value}, fresh=True)
    assert {p.config.ts for p in read_records(file)} == {4}


def test_another_product_under_the_same_name_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    write(file, point(8, 20.0))
    other = type(workload()).from_json({**workload().to_json(), "digest": "f" * 16})
    with Records(file) as records:
        records.open(HEADER)
        with pytest.raises(UserError, match="its IR differs"):
            records.define([other])


@pytest.mark.parametrize("content", [b"{}\n", b"hello\n", b'{"format":"other"}\n', b"\x00\x01"])
def test_other_files_are_never_overwritten(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "r.jsonl"
    file.write_bytes(content)
    for fresh in (False, True):
        with pytest.raises(UserError, match=r"no file of python -m tuning.sweep"):
            write(file, fresh=fresh)
    with pytest.raises(UserError):
        read_records(file)
    assert file.read_bytes() == content


def test_damage_in_the_middle_is_told(tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    write(file, point(8, 20.0), point(4, 25.0))
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:2], b"#" + lines[2][1:], lines[3]]))
    with pytest.raises(UserError, match="damaged at byte"):
        read_records(file)
    file.write_bytes(b"".join([*lines[:2], json.dumps({"workload": "w"}).encode() + b"\n"]))
    with pytest.raises(UserError, match="says nothing of a sweep"):
        read_records(file)


def test_a_full_disk_leaves_the_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "r.jsonl"
    write(file, point(8, 20.0))
    before = file.read_bytes()
    real = os.write

    def full(descriptor: int, data: bytes) -> int:
        real(descriptor, data[:9])
        raise OSError(errno.ENOSPC, "No space left on device")

    with Records(file) as records:
        records.open(HEADER)
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left"):
            records.add(point(4, 1.0))
        monkeypatch.undo()
    assert file.read_bytes() == before


def test_two_writers(tmp_path: Path) -> None:
    with Records(tmp_path / "r.jsonl") as first:
        first.open(HEADER)
        with pytest.raises(UserError, match="another run is writing"):
            Records(tmp_path / "r.jsonl").open(HEADER)


def test_missing_records(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no records.*tuning.sweep"):
        read_records(tmp_path / "none.jsonl")


# -- what is applied -----------------------------------------------------------------------------------------


def stock(time_us: float) -> Point:
    return Point(workload().name, STOCK, STOCK_POINT, "ok", time_us, 0.1, 3.0, 20)


def test_the_fastest_point_is_a_candidate_only_if_it_clearly_wins(tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    write(file, stock(20.0), point(8, 15.0), point(4, 17.0))
    chosen = candidate(read_records(file), workload().name)
    assert chosen is not None and chosen.config.ts == 8
    assert chosen.told == {"time_us": 15.0, "stock_us": 20.0}
    write(tmp_path / "s.jsonl", stock(20.0), point(8, 19.99))
    assert candidate(read_records(tmp_path / "s.jsonl"), workload().name) is None
    assert not clearly_faster(stock(20.0), stock(20.0))


def test_gains_are_of_the_same_rounds() -> None:
    ours, theirs = Rates((20.0, 40.0, 60.0), (1.0,) * 3), Rates((10.0, 20.0, 30.0), (1.0,) * 3)
    gain = Gain.of(ours, theirs)
    assert (gain.ratio, gain.sd) == (2.0, 0.0) and gain.wins() and not gain.loses()
    assert Gain.of(theirs, ours).loses()
    even = Gain.of(Rates((10.0, 12.0, 9.0), (1.0,) * 3), Rates((10.0, 10.0, 10.0), (1.0,) * 3))
    assert not even.wins() and not even.loses()


def test_schedule_files_round_trip_and_are_checked(tmp_path: Path) -> None:
    file = tmp_path / "t.toml"
    tuned = Tuned(
        {"target": "h200", "device": "a GPU"}, (TunedPoint(768, 768, 1, "float16", STOCK_POINT, {"time_us": 1.5}),)
    )
    tuned.write(file)
    assert load_tuned(file, "h200") == tuned
    with pytest.raises(UserError, match="measured for h200, this is t4"):
        load_tuned(file, "t4")
    with pytest.raises(UserError, match="no such file"):
        load_tuned(tmp_path / "none.toml")
    text = file.read_text()
    for broken, word in [
        ("[[", "no TOML"),
        ("a = 1", "no schedule file"),
        (text.replace("TS = 16", "TX = 16"), "TX"),
        (text.replace("outputs = 768\n", ""), "damaged"),
        (text.replace("TS = 16", "TS = 0"), "TS"),
    ]:
        file.write_text(broken)
        with pytest.raises(UserError, match=word):
            load_tuned(file, "h200")
