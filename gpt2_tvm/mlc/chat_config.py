"""`mlc-chat-config.json`: what mlc-llm's and web-llm's engines read of a model before they load its library.

Fields: mlc-llm, python/mlc_llm/protocol/mlc_chat_config.py and conversation_protocol.py. GPT-2 was never taught to
converse, so its template adds nothing to what a caller writes: a chat's messages lie end to end, and a completion is
the prompt alone.
"""

from __future__ import annotations

from typing import Any

from gpt2_tvm.config import GPT2Config

CHAT_CONFIG = "mlc-chat-config.json"
VERSION = "0.1.0"
ACTIVATION = "gelu_new"  # of mlc-llm's own definition of GPT-2, which knows no other


def chat_config(
    config: GPT2Config, told: dict[str, Any], eos_id: int | None, active_vocab: int, files: list[str]
) -> dict[str, Any]:
    """The file's content.

    Args:
        config: the model's shape.
        told: what the library's `_metadata` answers.
        eos_id: of the tokenizer; a completion ends with it. None: with the tokens it was given alone.
        active_vocab: ids that the tokenizer knows.
        files: of the tokenizer, beside the configuration.
    """
    ends = [] if eos_id is None else [eos_id]
    return {
        "version": VERSION,
        "model_type": "gpt2",
        "quantization": told["quantization"],
        "model_config": model_config(config, told),
        "vocab_size": config.vocab_size,
        "active_vocab_size": min(active_vocab, config.vocab_size),
        "context_window_size": told["context_window_size"],
        "sliding_window_size": -1,
        "prefill_chunk_size": told["prefill_chunk_size"],
        "attention_sink_size": -1,
        "tensor_parallel_shards": 1,
        "pipeline_parallel_stages": 1,
        "temperature": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "top_p": 1.0,
        "tokenizer_files": files,
        "tokenizer_info": {
            "token_postproc_method": "byte_level",
            "prepend_space_in_encode": False,
            "strip_space_in_decode": False,
        },
        "conv_template": {
            "name": "gpt2",
            "system_template": "{system_message}",
            "system_message": "",
            "system_prefix_token_ids": None,
            "add_role_after_system_message": False,
            "roles": {"user": "", "assistant": "", "tool": ""},
            "role_templates": {
                "user": "{user_message}",
                "assistant": "{assistant_message}",
                "tool": "{tool_message}",
            },
            "messages": [],
            "seps": [""],
            "role_content_sep": "",
            "role_empty_sep": "",
            "stop_str": [],
            "stop_token_ids": ends,
            "function_string": "",
            "use_function_calling": False,
        },
        "pad_token_id": 0 if eos_id is None else eos_id,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos_id,
        "model_task": "chat",
    }


def model_config(config: GPT2Config, told: dict[str, Any]) -> dict[str, Any]:
    """The fields of mlc-llm's own GPT2Config, and those of ours that decide what a model computes: mlc-llm puts aside
    what it does not know."""
    return {
        "vocab_size": config.vocab_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "n_inner": config.n_inner,
        "context_window_size": told["context_window_size"],
        "prefill_chunk_size": told["prefill_chunk_size"],
        "scale_attn_by_inverse_layer_idx": config.scale_attn_by_inverse_layer_idx,
        "tensor_parallel_shards": 1,
        "head_dim": config.head_dim,
        "max_batch_size": told["max_batch_size"],
        "scale_attn_weights": config.scale_attn_weights,
        "activation_function": config.activation_function,
        "tie_word_embeddings": config.tie_word_embeddings,
        "n_positions": config.n_positions,
    }
