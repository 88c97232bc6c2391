"""The interface of MLC: our GPT-2 with TVM's paged KV cache, under the function names that mlc-llm and web-llm call."""
