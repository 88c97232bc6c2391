"""Weights and dimensions left out, those of least magnitude first (`python -m gpt2_tvm.prune`).

| method | what goes | what is left |
| --- | --- | --- |
| magnitude | single weights of the blocks' matrices | the same shapes with zeros in them |
| inputs | input columns of every linear layer, by L2 norm | narrower matrices; what makes the input makes no more |
| mlp | units of the MLP | smaller c_fc and c_proj, no gather anywhere |
| heads | whole attention heads | smaller c_attn and c_proj, a smaller KV cache, no gather anywhere |

The inputs of mlp.c_proj are the MLP's units, so `inputs` cuts these too; LayerNorms write only what c_attn and c_fc
take; attention writes every channel, and a gather of its own stands between it and attn.c_proj.
"""

METHODS = ("magnitude", "inputs", "mlp", "heads")
SCOPES = ("layer", "global")
