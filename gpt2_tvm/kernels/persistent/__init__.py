"""A decode step of one sequence as one kernel: rule `persistent`, outside every target's own list.

One block on each multiprocessor lives for the whole step. Five phases a layer, a barrier of the grid after each; the
phases are those of the fused kernels (`step.cuh`). Three things differ from a CUDA graph of kernels:

- A kernel's first loads wait for the kernel before it to end. Here a block's weights are one stream (`stream.cuh`),
  asked for in 16 bytes, as far ahead as its ring in shared memory reaches: 72 KiB on an RTX 4090, 144 on an A100, 204
  on an H200, where that is nearly two layers of 124M in float16. Products, barriers and layers do not interrupt it.
- What follows a barrier needs no host and no launch; the barrier is one word in memory (`primitives.cuh`).
- Activations stay float32 between the phases; only keys and values are rounded to float16.

The launch is cooperative, so blocks that wait for each other are resident or the launch fails; the word of the barrier
needs no reset, so a captured graph may be replayed for ever. One launch of a loaded module at a time, as on a stream.

A step is two launches: this kernel, and the argmax or the draw that decoding on the device ends with.

**Predicted, not measured**, GPT-2 124M at 354 tokens, one sequence, on an H200 (4.8 TB/s). Bytes: weights and cache
read once. Barriers: 60, at 1 to 2 us for arrival, flag and the first load behind it. The least time is the larger of
both, where they overlap wholly; the most is their sum and 0.5 us a phase of arithmetic. A graph of kernels: 64 nodes
of 2 to 3 us (2.5 to 3.5 in float32), which contain the up to 1 us (2) of their bytes, and the head.

| us a token | bytes | barriers | persistent | graph of kernels |
| --- | --- | --- | --- | --- |
| float16 | 54 | 60-120 | 60-205 | 140-210 |
| float32 | 108 | 60-120 | 110-260 | 190-260 |

So it should win where barriers are near 1 us, and by at most two times; benchmarks/gpu.py has a line for it.

`shape.py`: what it is made for, and what it declines · `source.py`: the CUDA source of a shape · `kernel.py`: the
PrimFunc · `call.py`: where the model calls it · `*.cuh`: the code.
"""
