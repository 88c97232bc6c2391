"""Put the recorded outputs into README: `python scripts/quote_records.py`; with `--check` only say what is stale.

README marks each place with `<!-- quote NAME -->` and `<!-- end -->`; NAME is a file in `artifacts/records/readme/`.
Text goes into a fence, Markdown stands as it is.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RECORDS = ROOT / "artifacts" / "records" / "readme"
NOT_YET = "_Not measured yet on a quiet machine; the command prints the table._"  # where there is no record
BLOCK = re.compile(r"<!-- quote (?P<name>[\w.-]+) -->\n.*?<!-- end -->", re.DOTALL)


def quoted(text: str) -> str:
    """`text` with every marked block holding its record."""

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        record = RECORDS / name
        lines = record.read_text(encoding="utf-8").splitlines() if record.is_file() else [NOT_YET]
        body = "\n".join(line.rstrip() for line in lines).strip("\n")
        if name.endswith(".md"):
            body = re.sub(r"^#", "###", body, flags=re.MULTILINE)  # headings below the page's own
        else:
            body = f"```\n{body}\n```"
        return f"<!-- quote {name} -->\n{body}\n<!-- end -->"

    return BLOCK.sub(block, text)


def main() -> None:
    old = README.read_text(encoding="utf-8")
    new = quoted(old)
    if "--check" in sys.argv[1:]:
        if new != old:
            sys.exit("error: README quotes other outputs than artifacts/records/readme holds; run this without --check")
        return
    README.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
