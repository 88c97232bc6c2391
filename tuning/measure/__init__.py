"""Measuring artifacts for the laboratory.

| file | holds |
| --- | --- |
| `functions.py` | which function of a model takes how long, inside a prefill and inside a decode step |
| `replay.py`, `shaders.py` | how that is timed on TVM's virtual machine, and on WebGPU |
| `calls.py` | what an engine asks of its runner, watched |
| `session.py` | a prefill and a decode as a whole, here or on another machine through RPC |

`python -m tuning.measure ARTIFACT` prints the table of functions.
"""
