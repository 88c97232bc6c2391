"""The steps of `cpu_ladder.py`: matrix products written one idea at a time, and what measures and shows them."""
