"""Building and timing one point of a space: what a sweep's child processes do.

| file | holds |
| --- | --- |
| `numerics.py` | inputs, the expected result in numpy float64, and the comparison |
| `sampling.py` | repeat until the spread is small or the budget ends |
| `scheduling.py` | a workload's function at a point |
| `loading.py` | a workload's arrays on a device, with copies of its weight |
| `webgpu.py` | through wgpu: WGSL, timestamps |
| `compiled.py` | through TVM's runtime, in this process or over RPC: time_evaluator |
| `static.py` | no device: what the compiled kernel takes, and a model of its time |

Each backend is a class for `tuning.children.Child`: `make(announce, target, tasks)` in the child, then `build(name,
config)` and `run(name, config)`. What fails raises `children.Failure` with its status, or any exception at a stage that
says what it is.
"""
