"""The page of `python -m tuning.explain`: whole in itself, and read by a browser without a complaint; the command."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from commands import run_here

from gpt2_tvm.build import make_plan
from gpt2_tvm.config import GPT2Config
from targets import load_target
from tuning.explain import main
from tuning.report import Report, collect, markdown, render
from tuning.report.page import MAX_DEPTH, _tir

CONFIG = GPT2Config(vocab_size=97, n_positions=48, n_embd=64, n_layer=1, n_head=2)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
VOID = {"meta", "link", "input", "br", "rect", "path"}
CLOSES_ITSELF = {"tr", "td", "th"}  # HTML lets their end tags be left out, and the comparisons do


@pytest.fixture(scope="module")
def made() -> Report:
    return collect(make_plan(CONFIG, load_target("webgpu"), verify_widths=(4,)), "tiny <b>")


@pytest.fixture(scope="module")
def stock() -> Report:
    """With DLight's gemv, whose matrices are drawn."""
    return collect(make_plan(CONFIG, load_target("webgpu"), rules="stock", verify_widths=(4,)), "tiny")


@pytest.fixture(scope="module")
def page(made: Report) -> str:
    return render(made)


class Outline(html.parser.HTMLParser):
    """Checks that tags nest, and collects ids, links and what a keyboard reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.ids: Counter[str] = Counter()
        self.links: list[str] = []
        self.resources: list[str] = []
        self.scrolling: list[dict[str, str | None]] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        if found.get("id"):
            self.ids[str(found["id"])] += 1
        if tag == "a":
            self.links.append(str(found.get("href")))
        elif found.get("href") or found.get("src"):
            self.resources.append(str(found.get("href") or found.get("src")))
        if found.get("class") in ("scroll", "code", "code story"):
            self.scrolling.append(found)
        if tag not in VOID | CLOSES_ITSELF:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID | CLOSES_ITSELF:
            assert self.stack and self.stack[-1] == tag, (self.stack[-3:], tag, self.getpos())
            self.stack.pop()


def test_the_page_is_well_formed_and_needs_nothing_else(page: str, made: Report) -> None:
    outline = Outline()
    outline.feed(page)
    assert outline.stack == []
    assert {f.name for f in made.functions} <= set(outline.ids) and max(outline.ids.values()) == 1
    assert outline.resources == ["data:,"]
    assert {link.removeprefix("#") for link in outline.links} == {f.name for f in made.functions}
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(", page)
    assert all(found.get("tabindex") == "0" for found in outline.scrolling)
    assert "tiny &lt;b&gt;" in page and "tiny <b>" not in page
    assert len(page.encode()) < 10e6


def test_the_page_tells_the_whole_story_of_a_function(stock: Report) -> None:
    page = render(stock)
    f = next(f for f in stock.functions if f.rule == "gemv")
    section = page[page.index(f'<details class="function" id="{f.name}"') :]
    section = section[: section.index('<details class="function"', 1)]
    for needed in (
        "accepted: took it",
        "one factor is a vector",
        "rfactor",
        "data-axis=",
        'class="tile"',
        "WGSL under",
    ):
        assert needed in section, needed
    for title in ("as the model has it", "under gemv", "under baseline (fallback)"):
        assert title in section
    assert section.count("<svg") == 4 and section.count('class="diff"') == 2
    assert f"fn {f.name}_kernel" in re.sub(r"</?[bi]>", "", section)


def test_code_is_marked_and_escaped() -> None:
    line = 'for i in T.thread_binding(16, thread="threadIdx.y"):  # a<b'
    assert _tir(line) == (
        '<b>for</b> i <b>in</b> <mark class=thread>T.thread_binding</mark>(16, thread="threadIdx.y"):  <i># a&lt;b</i>'
    )
    assert "<mark class=shared>" in _tir('x = T.sblock_alloc_buffer((4,), scope="shared.dyn")')
    assert f".i{MAX_DEPTH}{{" in render(Report("m", "t", "d", "cpu", "q", (), {"apache-tvm": "0"}, None, None, 1))


def test_markdown_has_the_table_and_the_functions(made: Report) -> None:
    text = markdown(made)
    assert text.count("\n## ") == len(made.functions)
    assert all(f"| {f.name} |" in text for f in made.functions)
    assert "threadIdx.x × 64" in text and text.count("```") % 2 == 0


# In a browser --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> str:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium: apt install chromium")
    return found


def run_browser(browser: str, page: Path, tmp_path: Path, *options: str) -> tuple[str, list[str]]:
    """(stdout, what the console said) of a headless run."""
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--v=0", *options, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


# Chromium's own screenshots are blank where a link's fragment has scrolled the page; one of a frame is not.
FRAME = '<body style="margin:0"><iframe src="page.html#{name}" style="width:1300px;height:2200px;border:0"></iframe>'
OF_A_TILE = {"grid": "cfe4ff", "thread": "c9f0d2", "vector": "ffe0b8", "serial": "eef0f3"}  # as in drawing.css


def test_a_browser_shows_a_functions_drawings_without_a_complaint(browser: str, stock: Report, tmp_path: Path) -> None:
    """What is drawn, and not only that something is: the overview alone has none of a drawing's colours."""
    import numpy as np
    from matplotlib.image import imread

    (tmp_path / "page.html").write_text(render(stock), encoding="utf-8")
    f = next(f for f in stock.functions if f.after.tile)
    name, pixels = f.name, {}
    for shown in (name, "overview"):
        shot = tmp_path / f"{shown}.png"
        (tmp_path / "frame.html").write_text(FRAME.format(name=shown), encoding="utf-8")
        options = ("--allow-file-access-from-files", f"--screenshot={shot}", "--window-size=1300,2200")
        _, console = run_browser(browser, tmp_path / "frame.html", tmp_path, *options)
        assert console == []
        image = np.rint(imread(shot)[..., :3] * 255).reshape(-1, 3)
        for colour, code in OF_A_TILE.items():
            pixels[shown, colour] = int((image == tuple(bytes.fromhex(code))).all(axis=1).sum())
    assert all(pixels[name, colour] > 1000 and pixels["overview", colour] == 0 for colour in OF_A_TILE), pixels


def test_the_console_would_tell(browser: str, page: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.html"
    path.write_text(page.replace('getElementById("functions")', 'getElementById("functions").missing.part'), "utf-8")
    _, console = run_browser(browser, path, tmp_path, "--dump-dom")
    assert any("TypeError" in line for line in console)


# Opens everything, measures what sticks out, sorts by bytes and filters; the answer becomes the title.
PROBE = """
<iframe src="page.html#{name}" style="width:{width}px;height:900px;border:0"></iframe>
<script>
addEventListener("load", () => {{
  const inside = document.querySelector("iframe").contentWindow, page = inside.document;
  const opened = page.getElementById("{name}").open;
  page.querySelectorAll("details").forEach((d) => {{ d.open = true; }});
  const root = page.documentElement;
  let texts = 0;
  const sticksOut = [], overlaps = [];
  for (const svg of page.querySelectorAll("svg.drawing")) {{
    const boxes = [...svg.querySelectorAll("text")].map((t) => [t.textContent, t.getBBox()]);
    const {{width, height}} = svg.viewBox.baseVal;
    texts += boxes.length;
    boxes.forEach(([text, a], i) => {{
      if (a.x < 0 || a.y < 0 || a.x + a.width > width || a.y + a.height > height) sticksOut.push(text);
      for (const [other, b] of boxes.slice(0, i)) {{
        const across = Math.min(a.x + a.width, b.x + b.width) - Math.max(a.x, b.x);
        const down = Math.min(a.y + a.height, b.y + b.height) - Math.max(a.y, b.y);
        if (across > 1 && down > 2) overlaps.push([text, other]);  // lines of small boxes touch
      }}
    }});
  }}
  const bytes = () => [...page.querySelectorAll("#functions tbody tr")].map((r) => Number(r.cells[3].dataset.v));
  const head = page.querySelectorAll("#functions th button")[3];
  head.click(); const down = bytes(); head.click(); const up = bytes();
  const filter = page.getElementById("filter");
  filter.value = "gemv"; filter.dispatchEvent(new inside.Event("input"));
  const left = [...page.querySelectorAll("#functions tbody tr")].filter((r) => !r.hidden).length;
  document.title = JSON.stringify({{opened, width: root.clientWidth, content: root.scrollWidth, down, up, left,
    texts, sticksOut, overlaps,
    sort: page.querySelectorAll("#functions th")[3].getAttribute("aria-sort")}});
}});
</script>
"""


@pytest.mark.parametrize("width", [390, 1300])
def test_it_works_narrow_and_wide(browser: str, stock: Report, tmp_path: Path, width: int) -> None:
    (tmp_path / "page.html").write_text(render(stock), encoding="utf-8")
    name = stock.functions[3].name
    (tmp_path / "probe.html").write_text(PROBE.format(name=name, width=width), encoding="utf-8")
    options = ("--dump-dom", "--allow-file-access-from-files", "--window-size=1400,1000")
    dom, console = run_browser(browser, tmp_path / "probe.html", tmp_path, *options)
    assert console == []
    title = re.search(r"<title>(.*?)</title>", dom)
    assert title is not None, "the page did not load in the frame"
    seen = json.loads(html.unescape(title[1]))
    assert seen["opened"], "a link to a function opens it"
    assert seen["content"] <= seen["width"], "long lines must scroll or wrap inside their own boxes"
    assert seen["texts"] > 200 and seen["sticksOut"] == [] and seen["overlaps"] == []
    assert seen["down"] == sorted(seen["down"], reverse=True) and seen["up"] == sorted(seen["down"])
    assert seen["sort"] == "ascending"
    assert seen["left"] == sum("gemv" in f"{f.rule} {f.name} {f.role}" for f in stock.functions)


@pytest.mark.heavy
def test_gpt2_on_cuda(browser: str, tmp_path: Path) -> None:
    """The page that the study's reader opens: GPT-2 124M, half precision, for an RTX 4090."""
    from gpt2_tvm import toolchains

    if lack := toolchains.missing(load_target("rtx-4090")):
        pytest.skip(lack)
    path = tmp_path / "gpt2.html"
    options = ("--model", "gpt2", "--target", "rtx-4090", "--quantization", "q0f16", "--output", str(path))
    done = subprocess.run([sys.executable, "-m", "tuning.explain", *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = path.read_text(encoding="utf-8")
    assert len(text.encode()) < 10e6 and str(tmp_path) not in text.replace(str(path), "")
    tiles = [dict(re.findall(r'data-([\w-]+)="([^"]*)"', t)) for t in re.findall(r'<g class="tile"([^>]*)>', text)]
    assert len(tiles) == 6  # qkv, both projections, c_fc and the logits, at decode; these also over a temperature
    drawn = {(int(t["rows"]), int(t["columns"])): [int(t[k]) for k in ("ts", "tr", "tile-s", "tile-r")] for t in tiles}
    assert drawn == {  # TS, TR, TILE_S, TILE_R: of `norm-gemv`, and for c_proj of the MLP of `wide-gemv`
        **{(rows, 768): [8, 32, 1, 8] for rows in (768, 2304, 3072)},
        (50257, 768): [8, 32, 4, 8],
        (768, 3072): [1, 128, 1, 8],
    }
    for tile in tiles:
        rows = drawn[int(tile["rows"]), int(tile["columns"])]
        assert int(tile["blocks"]) == -(-int(tile["rows"]) // (rows[0] * rows[2])) and tile["vec"] == "4"
    assert run_browser(browser, path, tmp_path, "--dump-dom")[1] == []


# The command line ----------------------------------------------------------------------------------------------------


def explain(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "tuning.explain", *arguments], capture_output=True, text=True)


def test_help_is_quick_because_it_imports_no_tvm() -> None:
    code = (
        "import sys, tuning.explain; from typer.testing import CliRunner; "
        "r = CliRunner().invoke(tuning.explain.app, ['--help']); assert r.exit_code == 0, r.output; "
        "assert '--function' in r.output; sys.exit('tvm' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.heavy
def test_a_function_on_the_terminal(tiny_model: Path) -> None:
    done = explain("--model", str(tiny_model), "--target", "webgpu", "--function", "embed1", "--format", "md")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("# tiny on webgpu") and "Taken by **fallback**" in done.stdout
    assert "fn embed1_kernel" in done.stdout and "Under baseline: fallback is the rule" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--format", "pdf"), "--format pdf: choose html or md"),
        (("--target", "gpu9"), "no target is called 'gpu9'"),
        (("--rules", "only-magic"), "unknown rule 'magic'"),
        (("--model", "{model}", "--target", "webgpu", "--function", "embedd1"), "close to it: embed1"),
        (("--output", "{folder}"), "is a folder"),
        (("--model", "{model}", "--target", "webgpu", "--function", "layer"), "close to it: "),
    ],
)
def test_errors_are_one_line(arguments: tuple[str, ...], says: str, tiny_model: Path, tmp_path: Path) -> None:
    done = run_here("tuning.explain", *(a.format(model=tiny_model, folder=tmp_path) for a in arguments))
    assert done.returncode == 1 and done.stdout == ""
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and says in last


def test_what_cannot_be_written_is_said_before_the_build(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    output = ("--output", str(tmp_path / "file" / "page.html"))
    done = run_here("tuning.explain", "--model", str(tiny_model), "--target", "webgpu", *output)
    assert done.returncode == 1 and "lowering" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].endswith("cannot be written there; choose a file in a folder of yours")


def test_the_helps_own_example_names_a_function(tiny_model: Path) -> None:
    wanted = re.search(r'--target (\w+) --function "([^"]+)"', main.__doc__ or "")
    assert wanted is not None
    done = explain("--model", str(tiny_model), "--target", wanted[1], "--function", wanted[2], "--format", "md")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n## ") == 1 and "Taken by **cpu-gemv**" in done.stdout
