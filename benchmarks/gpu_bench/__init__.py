"""The parts of benchmarks/gpu.py: what they measure, their report, and the kit they travel in."""
