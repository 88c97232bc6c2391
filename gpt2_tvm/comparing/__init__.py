"""Artifacts of one model beside each other: size, memory, speed and quality in one run (`gpt2_tvm.compare`)."""
