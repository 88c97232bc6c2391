"""The same GPT-2 weights in other engines, for `benchmarks/peers_cpu.py`.

| file | holds |
| --- | --- |
| `engines.py` | the engines by name: packages, how they store weights, what prepares and what runs each |
| `setup.py` | what every engine is given, and what their subjects share |
| `ours.py`, `torch_models.py`, `llama.py`, `ct2.py` | one engine a file: its own files, and its `Subject` |
| `gguf_file.py` | a checkpoint as the GGUF file that llama.cpp loads |
| `run.py` | one run: prepare, load, time, result |
| `report.py`, `verdict.py` | rows, tables, and what the project asks of itself beside what was reached |

Importing any of these is light: each engine's libraries are loaded by the process that runs it.
"""
