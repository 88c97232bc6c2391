"""Defects of TVM 0.27's web sources, mended in the copy that is compiled."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Patch:
    """Replace `old`, which must occur once, by `new` in `file` (a path within TVM's source tree).

    why: what goes wrong without it.
    """

    name: str
    file: str
    old: str
    new: str
    why: str

    def apply(self, text: str) -> str:
        """`text` mended. ValueError where `old` does not occur exactly once: another version of TVM."""
        if text.count(self.old) != 1:
            raise ValueError(f"{self.file} is not as patch {self.name} expects it")
        return text.replace(self.old, self.new)


PATCHES = (
    Patch(
        name="time-evaluator-handle",
        file="web/emcc/tvmjs_support.cc",
        old="const void* pf = encoded_args[0].as<ffi::FunctionObj>();",
        new="const void* pf = encoded_args[1].cast<void*>();",
        why="A returned function is encoded as (type, handle). Looking for it in the first field ends the page's "
        "runtime whenever a time_evaluator is asked for over RPC.",
    ),
    Patch(
        name="launch-guard",
        file="web/emcc/webgpu_runtime.cc",
        old="  stream.Read(&smap);\n",
        new="""  stream.Read(&smap);
  // The code generator lets the block after the last one through: it tests `> packGridDimX` for `>=`.
  for (auto& entry : smap) {
    const std::string guard = "> podArgs.packGridDimX)";
    size_t at = 0;
    while ((at = entry.second.find(guard, at)) != std::string::npos) {
      entry.second.insert(at + 1, "=");
      at += guard.size() + 1;
    }
  }
""",
        why="A grid of 65536 blocks or more along x is folded into z, which adds blocks; the first of them is not "
        "turned away and writes past the end.",
    ),
)
