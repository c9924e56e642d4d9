"""Transformers' families that do not look their attention up by name: where the middle of their own code is replaced.

A row names the family's attention class, the method that is replaced, and what takes its place: the module's own
projections (with whatever adapters are on them), positions, dropouts and residual stay, and ``attend`` computes the
rest, ``softmax(scores) values``. `tests/compat/test_own_attention.py` names what a release has changed.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

# attend(module, query, key, value, mask, scaling=, dropout=, sliding_window=, alibi_slopes=): tensors of (1, heads,
# tokens, head_dim) in, (1, tokens, heads, head_dim) out.
Attend = Callable[..., "torch.Tensor"]


@dataclass(frozen=True)
class OwnAttention:
    """A family's own attention code.

    Attributes:
        module: the name of its attention class.
        method: the method that is replaced.
        replacement: ``replacement(attend, module, slopes, *args, **kwargs)``, called like the method.
        alibi: ``alibi(decoder)``: the linear biases of a sequence of two tokens, (heads, 1, 2); None without any.
    """

    module: str
    method: str
    replacement: Callable[..., Any]
    alibi: Callable[[Any], "torch.Tensor"] | None = None


def _bloom(attend: Attend, module: Any, slopes: Any, hidden: Any, residual: Any, **kwargs: Any) -> Any:
    query, key, value = module._reshape(module.query_key_value(hidden))
    scores = {"scaling": module.inv_norm_factor, "alibi_slopes": slopes}
    dropout = module.attention_dropout.p if module.training else 0.0
    out = attend(module, query, key, value, kwargs["attention_mask"], dropout=dropout, **scores)
    return _dropped(module.dense(out.flatten(2)), module.hidden_dropout, module) + residual, None


def _bloom_alibi(decoder: Any) -> "torch.Tensor":
    import torch

    mask = torch.ones(1, 2, device=decoder.device)
    return decoder.build_alibi_tensor(mask, decoder.num_heads, torch.float32)


def _mpt(attend: Attend, module: Any, slopes: Any, hidden: Any, **kwargs: Any) -> Any:
    qkv = module.Wqkv(hidden)
    if module.clip_qkv:
        qkv = qkv.clamp(-module.clip_qkv, module.clip_qkv)
    parts = (part.unflatten(-1, (module.n_heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
    scores = {"scaling": module.softmax_scale, "alibi_slopes": slopes}
    dropout = module.attn_dropout_p if module.training else 0.0
    out = attend(module, *parts, kwargs["attention_mask"], dropout=dropout, **scores)
    return module.out_proj(out.flatten(2)), None


def _mpt_alibi(decoder: Any) -> "torch.Tensor":
    return decoder.build_mpt_alibi_tensor(decoder.num_heads, 2, device=decoder.device)


def _falcon(attend: Attend, module: Any, slopes: Any, hidden: Any, **kwargs: Any) -> Any:
    from transformers.models.falcon import modeling_falcon

    parts = (part.transpose(1, 2) for part in module._split_heads(module.query_key_value(hidden)))
    query, key, value = parts
    query, key = modeling_falcon.apply_rotary_pos_emb(query, key, *kwargs["position_embeddings"])
    out = attend(module, query, key, value, kwargs["attention_mask"], scaling=module.inv_norm_factor)
    return module.dense(out.flatten(2)), None


def _gptj(attend: Attend, module: Any, slopes: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
    dropout = module.attn_dropout.p if module.training else 0.0
    out = attend(module, query, key, value, mask, scaling=1 / module.scale_attn, dropout=dropout)
    return out.transpose(1, 2), None


def _gpt_neo(attend: Attend, module: Any, slopes: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
    window = module.config.window_size if module.attention_type == "local" else None
    dropout = module.attn_dropout.p if module.training else 0.0
    out = attend(module, query, key, value, mask, scaling=1.0, dropout=dropout, sliding_window=window)
    return out.transpose(1, 2), None


def _dropped(x: "torch.Tensor", p: float, module: "nn.Module") -> "torch.Tensor":
    from torch.nn import functional

    return functional.dropout(x, p, module.training)


# transformers' model_type -> row
FAMILIES = {
    "bloom": OwnAttention("BloomAttention", "forward", _bloom, _bloom_alibi),
    "falcon": OwnAttention("FalconAttention", "forward", _falcon),
    "gpt_neo": OwnAttention("GPTNeoSelfAttention", "_attn", _gpt_neo),
    "gptj": OwnAttention("GPTJAttention", "_attn", _gptj),
    "mpt": OwnAttention("MptAttention", "forward", _mpt, _mpt_alibi),
}


def unsupported_reason(model: Any) -> str | None:
    """Reason why the attention of `model`, which is not looked up by name, cannot be replaced; None where it can."""
    family = model.config.model_type
    row = FAMILIES.get(family)
    if row is None or not any(type(module).__name__ == row.module for module in model.modules()):
        return f"{family} has attention code of its own"
    if family == "falcon" and model.config.alibi:
        return "falcon adds its linear biases (alibi) to the mask"
    if family == "bloom" and model.config.pretraining_tp > 1 and model.config.slow_but_exact:
        return "slow_but_exact is asked for"
    return None


def replacements(model: Any, takes: Callable[[Any], bool], attend: Attend) -> "list[tuple[Any, str, Any]]":
    """Attributes to set on the modules of `model` so that `attend` computes its attention.

    Args:
        model: one without an `unsupported_reason`.
        takes: tells by its mask whether a call is for `attend`; the others stay the family's own.
        attend: see this module's `Attend`.

    Returns:
        The owner, the name and the value of each.
    """
    row, decoder = FAMILIES[model.config.model_type], model.base_model
    slopes = None
    found: list[tuple[Any, str, Any]] = []
    if row.alibi is not None:
        alibi = row.alibi(decoder)[:, 0]
        slopes = (alibi[:, 1] - alibi[:, 0]).contiguous()
    if hasattr(decoder, "build_alibi_tensor"):  # it reads the mask's two dimensions, and ours has four
        build = decoder.build_alibi_tensor

        def build_alibi_tensor(mask: Any, *args: Any, **kwargs: Any) -> Any:
            return slopes if takes(mask) else build(mask, *args, **kwargs)

        found.append((decoder, "build_alibi_tensor", build_alibi_tensor))

    def replaced(module: Any, own: Any, *args: Any, **kwargs: Any) -> Any:
        mask = kwargs["attention_mask"] if "attention_mask" in kwargs else args[-1]
        if not takes(mask):
            return own(*args, **kwargs)
        return row.replacement(attend, module, slopes, *args, **kwargs)

    for module in model.modules():
        if type(module).__name__ == row.module:
            own = getattr(module, row.method)
            found.append((module, row.method, functools.partial(replaced, module, own)))
    return found
