"""Measuring an artifact's speed: what `python -m gpt2_tvm.benchmark` does.

| file | holds |
| --- | --- |
| `cases.py` | the cross product of sizes, what one turn gives, and the checks made before anything is timed |
| `subjects.py`, `peers.py` | what can be timed: our engine; the same weights in transformers, in mlc_llm |
| `workers.py` | one child process for each of them, asked in turn |
| `timing.py` | the rounds: every configuration once a round, so that noise hits all alike |
| `noise.py` | how busy others kept the machine meanwhile |
| `bounds.py` | bytes that a decode step must read, and the bandwidth that bounds it |
| `session.py` | one run, from the checks to the result |
| `results.py`, `tables.py` | rows and comparisons from samples; Markdown, CSV, JSON, JSON lines |
| `collect.py` | results of several devices in one table and one chart |
"""
