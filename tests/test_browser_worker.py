"""The GEMV tuner's points in a page of a headless Chromium."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import web_tools

from gpt2_tvm.errors import UserError
from gpt2_tvm.schedules.gemv_config import GemvConfig
from gpt2_tvm.toolchains import web
from gpt2_tvm.toolchains.webruntime.build import runtime_objects
from gpt2_tvm.toolchains.webruntime.patches import PATCHES
from tuning import records as store
from tuning import sweep, sweep_setup
from tuning.candidates import backends, browser, page
from tuning.candidates.browser import BrowserCandidates
from tuning.candidates.sampling import Budget
from tuning.children import Failure


def test_a_browser_is_for_webgpu() -> None:
    with pytest.raises(UserError, match="give --target webgpu"):
        backends.backend_of("rtx-4090", browser=True)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(web, "WEB", tmp_path)
    with pytest.raises(UserError, match="npm ci --prefix web"):
        page.browser_arguments(None, lambda what: None)
    (tmp_path / web.JS_RUNTIME).parent.mkdir(parents=True)
    (tmp_path / web.JS_RUNTIME).write_text("")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CHROMIUM", raising=False)
    with pytest.raises(UserError, match="no Chromium on PATH"):
        page.browser_arguments(None, lambda what: None)


def test_unknown_runner_is_refused() -> None:
    with pytest.raises(UserError, match="the only one to name is browser"):
        sweep.main(model="bundled", target="webgpu", runner="firefox")


@pytest.fixture(scope="module")
def pages() -> Iterator[tuple[int | None, str | None]]:
    """What `BrowserCandidates` takes after the budget, or a skip."""
    web_tools.emcc()
    web_tools.packages()
    web_tools.browser()
    pytest.importorskip("tornado", reason="TVM's RPC proxy needs tornado")
    yield page.browser_arguments(None, lambda what: None)


@pytest.mark.heavy
def test_six_points_of_the_bundled_model(pages: object, tmp_path: Path) -> None:
    file = tmp_path / "points.jsonl"
    plan = sweep_setup.Setup.make("bundled", "webgpu", "q0f32", 1, "attn.c_proj", "schedule1", "random", 5, 0)
    specs = plan.workers(False, None, None, None, 0.1, 0.1, "browser")
    facts = plan.probe(specs)
    assert facts["method"] == "time_evaluator in a page" and facts["launch_floor_us"] > 0
    assert "Chrom" in facts["browser"]
    with sweep_setup.open_records(file, plan, facts, True) as records:
        plan.run(records, specs, 60.0, lambda search, point: None)
        found = list(records)
    assert len(found) == 6 and any(p.space == store.STOCK for p in found)
    assert {p.status for p in found} <= {"ok", "invalid"}
    done = [p for p in found if p.ok]
    assert len(done) >= 4
    assert all(p.time_us and p.gb_s and p.samples >= 2 for p in done)


@pytest.fixture(scope="module")
def measuring(pages: tuple[int | None, str | None]) -> Iterator[tuple[BrowserCandidates, str, GemvConfig]]:
    """A page that measures in this process, a product and its stock point."""
    plan = sweep_setup.Setup.make("bundled", "webgpu", "q0f32", 1, "attn.c_proj", "schedule1", "random", 1, 0)
    (name,) = plan.tasks
    made = BrowserCandidates(lambda *what: None, "webgpu", plan.tasks, Budget(seconds=0.1, spread=0.1), *pages)
    yield made, name, plan.searches[0].stock
    made.page.close()


@pytest.mark.heavy
def test_a_shader_that_webgpu_refuses_is_a_compile_error(
    measuring: tuple[BrowserCandidates, str, GemvConfig],
) -> None:
    made, name, config = measuring
    made.build(name, config)
    good = made.built[name, config]
    bad = good.replace(b"@workgroup_size(", b"@workgroup_sizx(")
    assert bad != good
    made.built[name, config] = bad
    with pytest.raises(Failure) as caught:
        made.run(name, config)
    assert caught.value.status == "compile-error" and "WebGPU" in caught.value.detail
    made.built[name, config] = good
    assert made.run(name, config)["time_us"] > 0  # the page is none the worse for it


@pytest.mark.heavy
def test_the_browser_ends_with_the_process_that_wanted_it(pages: tuple[int | None, str | None]) -> None:
    """Also when that is killed and can tidy nothing up."""
    import psutil

    code = f"from tuning.candidates.page import Page; p = Page(*{pages!r}); print(p.folder, flush=True); input()"
    owner = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    folder = owner.stdout.readline().strip()

    def left() -> list[psutil.Process]:
        return [p for p in psutil.process_iter(["cmdline"]) if any(folder in part for part in p.info["cmdline"] or [])]

    assert folder and left()
    owner.kill()
    owner.wait()
    for _ in range(150):
        if not left() and not Path(folder).exists():
            break
        time.sleep(0.1)
    assert not left() and not Path(folder).exists()


@pytest.mark.heavy
def test_wrong_numbers_are_found(
    measuring: tuple[BrowserCandidates, str, GemvConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, name, config = measuring
    right = browser.make_example

    def another(*arguments: Any) -> Any:
        example = right(*arguments)
        return replace(example, expected=example.expected + 1)

    monkeypatch.setattr(browser, "make_example", another)
    made.build(name, config)
    with pytest.raises(Failure, match="outputs are off") as caught:
        made.run(name, config)
    assert caught.value.status == "wrong-result"


@pytest.mark.heavy
def test_without_the_patch_the_evaluator_ends_the_page(
    measuring: tuple[BrowserCandidates, str, GemvConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, name, config = measuring
    stock = runtime_objects(patches=[p for p in PATCHES if p.name != "time-evaluator-handle"])
    monkeypatch.setattr(web, "runtime_objects", lambda say=None: stock)
    made.build(name, config)
    with pytest.raises(Failure) as caught:
        made.run(name, config)
    assert caught.value.status == "crash" and "page" in caught.value.detail
    monkeypatch.undo()
    made.build(name, config)
    assert made.run(name, config)["time_us"] > 0  # the page loads again by itself


@pytest.mark.heavy
def test_a_page_takes_part_behind_a_tracker(pages: tuple[int | None, str | None], tmp_path: Path) -> None:
    """A browser's worker looks to a sweep like any other behind the tracker."""
    from tvm.rpc.tracker import Tracker

    from tuning import worker

    tracker = Tracker("127.0.0.1", port=web.free_port(), port_end=65535, silent=True)
    server = worker.serve(("127.0.0.1", tracker.port), "web", page=pages)
    try:
        plan = sweep_setup.Setup.make("bundled", "webgpu", "q0f32", 1, "attn.c_proj", "schedule1", "random", 2, 0)
        specs = plan.workers(False, 1, f"127.0.0.1:{tracker.port}", "web", 0.1, 0.1)
        facts = plan.probe(specs)
        assert facts["device"].endswith("in a browser")
        with sweep_setup.open_records(tmp_path / "points.jsonl", plan, facts, True) as records:
            plan.run(records, specs, 60.0, lambda search, point: None)
            found = list(records)
        assert len(found) == 3 and any(p.ok for p in found)
    finally:
        server.terminate()
        tracker.terminate()
