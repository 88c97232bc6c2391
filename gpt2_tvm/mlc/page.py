"""`python -m gpt2_tvm.mlc.page FOLDER`: a page on which web-llm, as npm has it, completes prompts with an exported
model. It needs this project's source and npm's packages; it is how the export is checked, not how a model is served.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer

from gpt2_tvm.cli import run
from gpt2_tvm.errors import UserError
from gpt2_tvm.export_mlc import RECORD
from gpt2_tvm.mlc.chat_config import CHAT_CONFIG
from gpt2_tvm.serve_web import LoopbackServer

app = typer.Typer(add_completion=False, rich_markup_mode=None)

PORT = 8325
PAGE_FILES = ("index.html", "page.js", "page.css")
WEB_LLM = "node_modules/@mlc-ai/web-llm/lib/index.js"


def page_server(export: str | Path, port: int = PORT) -> LoopbackServer:
    """A server of the page, of web-llm as it is installed, and of one exported folder, under the kind of address that
    web-llm asks for. Raises UserError for a folder that is no export for pages, and where web-llm is not installed."""
    folder = Path(export).resolve()
    if not (folder / RECORD).is_file() or not (folder / CHAT_CONFIG).is_file():
        raise UserError(
            f"{export} is no model for pages (it has no {RECORD}); make one with python -m gpt2_tvm.export_mlc "
            "from an artifact of --target webgpu --interface mlc"
        )
    root = f"/models/{folder.name}/resolve/main/"
    record: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    record |= {"model": quote(root), "model_lib": quote(root + record["model_lib"])}
    files = {f"/{name}": _web() / "mlc" / name for name in PAGE_FILES}
    files |= {"/icon.svg": _web() / "src" / "icon.svg"}
    files |= {"/": files["/index.html"], "/web-llm.js": _web() / WEB_LLM}
    files |= {root + file.name: file for file in folder.iterdir()}
    return LoopbackServer(files, {"/record.json": json.dumps(record).encode()}, port)


def _web() -> Path:
    from gpt2_tvm.toolchains.web import WEB

    if not (WEB / WEB_LLM).is_file():
        where = "web" if WEB.is_dir() else "the folder web of this project's source"
        raise UserError(f"web-llm is not installed; run: npm ci --prefix {where} (needs node 20 or later)")
    return WEB


@app.command()
def main(
    export: Annotated[Path, typer.Argument(metavar="FOLDER", help="Made by export_mlc from an artifact for webgpu.")],
    port: Annotated[int, typer.Option(help="Where to listen; 0 for any free port.")] = PORT,
) -> None:
    """Serve a page with web-llm and an exported model, on this machine alone; end it with Ctrl+C."""
    with page_server(export, port) as server:
        print(f"open {server.address} in a browser that has WebGPU; Ctrl+C ends it", flush=True)
        server.serve_forever(poll_interval=0.2)


if __name__ == "__main__":
    run(app)
