"""Training a checkpoint further in torch, zeros and cuts of a pruned one included (`python -m gpt2_tvm.finetune`)."""
