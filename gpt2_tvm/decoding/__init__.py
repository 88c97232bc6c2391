"""Decoding strategies over the engine, and what they share. Nothing here imports TVM."""
