"""Inference maths: what a forward pass costs, on paper and counted over the compiled module.

| file | holds |
| --- | --- |
| `dtypes.py` | bytes an element for each kind of tensor |
| `form.py` | polynomials in batch, rows, cached tokens and capacity, with exact coefficients |
| `closed.py` | the closed forms of embedding, MHA, MLP and head |
| `counted.py` | the same parts counted over the Relax and TIR functions of the real module |
| `explain.py` | where the two differ: each reason with its exact share |
| `machine.py` | bandwidth and FLOP/s of a device |
| `predict.py` | latency, what bounds it, the KV cache's size and gain |
| `speculation.py` | speculative decoding: expected tokens, speed-up, the best draft length |
| `measured.py` | points of a benchmark file, or of times by function |
| `report.py`, `tables.py` | one report from all of it; as Markdown |
| `figures.py` | the roofline and the speculation curve |
"""
