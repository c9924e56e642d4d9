"""Tiny models of real families, and a tokenizer for them, made in the process: no file, no download, milliseconds.

    from tiny import FAMILIES, save_tiny, tiny_model, tiny_tokenizer

Every weight is random and none is zero (biases and norm weights too), so that a test sees each of them.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCAB, HIDDEN, LAYERS, HEADS, KV_HEADS, WIDTH, POSITIONS = 304, 32, 2, 4, 2, 64, 512
TOKENS = (
    300  # of the tokenizer; the model has a few more, as real ones do, since some families add a token of their own
)

_COMMON: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LLAMA: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": POSITIONS,
}
_LLAMA_HEADS = _LLAMA | {"head_dim": HIDDEN // HEADS}
_LLAMA_MHA = {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"}
_GPT2: dict[str, Any] = {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": POSITIONS}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}

# family (transformers' model_type) -> what makes it tiny
_ROWS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "bloom": {"hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": HEADS},
    "gptj": _GPT2 | {"rotary_dim": 4},
    "mistral": _LLAMA_HEADS | {"sliding_window": None},
    "qwen2": _LLAMA,
    "qwen3": _LLAMA_HEADS,
    "gemma": _LLAMA_HEADS,
    "gemma2": _LLAMA_HEADS | {"query_pre_attn_scalar": 8, "sliding_window": 256},
    "gemma3_text": _LLAMA_HEADS | {"query_pre_attn_scalar": 8, "sliding_window": 256},
    "phi": _LLAMA,
    "phi3": _LLAMA | {"original_max_position_embeddings": POSITIONS},
    "olmo2": _LLAMA,
    "granite": _LLAMA,
    "stablelm": _LLAMA | {"use_qkv_bias": True},
    "starcoder2": _LLAMA | {"sliding_window": None},
    "cohere": _LLAMA,
    "smollm3": _LLAMA,
    "glm": _LLAMA_HEADS | {"attention_bias": True},
    "glm4": _LLAMA_HEADS | {"attention_bias": True},
    "gpt2": _GPT2,
    "gpt_neo": {
        "hidden_size": HIDDEN,
        "num_layers": LAYERS,
        "num_heads": HEADS,
        "intermediate_size": WIDTH,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 256,
        "max_position_embeddings": POSITIONS,
    },
    "gpt_neox": _LLAMA_MHA,
    "opt": {
        "hidden_size": HIDDEN,
        "word_embed_proj_dim": HIDDEN,
        "ffn_dim": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": POSITIONS,
    },
    "falcon": _LLAMA_MHA | {"new_decoder_architecture": False, "bias": True},
    "mpt": {"d_model": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS, "max_seq_len": POSITIONS},
    "mixtral": _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen3_moe": _LLAMA_HEADS | _EXPERTS | {"moe_intermediate_size": HIDDEN, "decoder_sparse_step": 1},
    "olmoe": _LLAMA | _EXPERTS,
}

FAMILIES = tuple(_ROWS)


def tiny_config(family: str, **overrides: Any) -> Any:
    """The family's own config class with tiny sizes; `overrides` win."""
    return AutoConfig.for_model(family, **(_COMMON | _ROWS[family] | overrides))


def tiny_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """A random model of `family` in eval mode; the same `seed` gives the same weights. `overrides` go to the config.

    The global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family, **overrides))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.to(dtype).eval()


_SENTENCES = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "### Instruction:\nTom has 12 apples and buys 7 more. How many apples does Tom have now?\n\n### Response:\n",
    "The answer is 19. She sold 3 boxes of 24 eggs, so 3 * 24 = 72 eggs are gone and 5 are left.",
)


@cache
def _tokenizer_json() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    return tokenizer.to_str()


def tiny_tokenizer(**overrides: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (300 tokens, any text round-trips, no BOS added); ids 0, 1, 2 are <pad>, <s>, </s>."""
    from tokenizers import Tokenizer

    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "padding_side": "left"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_tokenizer_json()), **(special | overrides))


def save_tiny(folder: str | Path, family: str = "llama", seed: int = 0, **overrides: Any) -> Path:
    """Write a tiny model and its tokenizer to `folder`, as `AutoModelForCausalLM.from_pretrained` reads them."""
    tiny_model(family, seed, **overrides).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return Path(folder)
