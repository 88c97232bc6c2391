"""How well a compiled model predicts a text: what `python -m gpt2_tvm.perplexity` does.

| file | holds |
| --- | --- |
| `text.py` | loaders: plain text, WikiText raw and tokenised |
| `detokenize.py` | WikiText's spaced-out text back to text as people write it |
| `windows.py` | sliding windows over a long text |
| `scoring.py` | the sum over the windows on an engine: perplexity, bits a token and a byte |
"""
