"""The causal model's forward in training: a pack or padded rows in, the sum of the losses at the labels out."""

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llm_adapters.fast_paths import attention
from llm_adapters.ops.cross_entropy import fused_linear_cross_entropy
from llm_adapters.ops.packing import Pack

if TYPE_CHECKING:
    from llm_adapters.fast_paths.session import FastPaths


def pack_arguments(pack: Pack) -> dict[str, Any]:
    """Gather what a transformers model takes for a pack, besides its ids."""
    return {
        "position_ids": pack.position_ids,
        "attention_mask": attention.mask_of(pack, pack.input_ids.device),
        "use_cache": False,
    }


def hidden_states(base: Any, pack: Pack) -> torch.Tensor:
    """Compute the decoder's last hidden states of a pack, (1, tokens, hidden size)."""
    return base.base_model(input_ids=pack.input_ids, **pack_arguments(pack)).last_hidden_state


def causal_forward(
    fast_paths: "FastPaths",
    own: Any,
    *args: Any,
    label_positions: torch.Tensor | None = None,
    targets: torch.Tensor | None = None,
    pack: Pack | None = None,
    seq_len: int = 0,
    **kwargs: Any,
) -> Any:
    """Compute the causal model's forward; with `label_positions` and `targets`, the sum of the losses there.

    It is a forward, and no function beside the model, so that wrappers (PEFT's, DDP's) see the call.

    Args:
        fast_paths: the session.
        own: the model's own forward.
        args: its arguments.
        label_positions: (labels,), int64: where the labels are predicted, in the row of a `pack` or in the flattened
            padded `input_ids`.
        targets: (labels,), int64: the labels.
        pack: the pack, where it is one.
        seq_len: tokens of a row, those that a method puts before it not counted.
        kwargs: the own forward's arguments.

    Returns:
        What the own forward returns, or ``{"loss": scalar}``.

    Raises:
        ValueError: a pack, where packs are off.
    """
    if label_positions is None or targets is None:
        return own(*args, **kwargs)
    if pack is not None and not fast_paths.packs:  # the family's own attention would let its segments see each other
        reason = fast_paths.report.get("packing", "the fast paths are off")
        raise ValueError(f"this model takes no packs ({reason}): give the Collator packed=fast_paths.packs")
    base = fast_paths.base
    if fast_paths.fused_cross_entropy:
        if pack is not None:
            hidden = hidden_states(base, pack)
        else:
            padded = {key: kwargs[key] for key in ("input_ids", "attention_mask")}
            hidden = base.base_model(**padded, use_cache=False).last_hidden_state
        head = base.get_output_embeddings()
        chosen = hidden.reshape(-1, hidden.shape[-1]).index_select(0, label_positions)
        return {"loss": fused_linear_cross_entropy(chosen, head.weight, head.bias, targets)}
    first = 0
    if "logits_to_keep" in inspect.signature(type(base).forward).parameters:
        first = int((label_positions % seq_len).min()) if len(label_positions) else seq_len - 1
        kwargs["logits_to_keep"] = seq_len - first
    if pack is not None:
        kwargs |= pack_arguments(pack)
    # Of methods with virtual tokens the logits begin with theirs; the last ones are the sequence's.
    logits = own(*args, **kwargs | {"use_cache": False}).logits[:, first - seq_len :]
    places = label_positions // seq_len * (seq_len - first) + label_positions % seq_len - first
    chosen = logits.reshape(-1, logits.shape[-1]).index_select(0, places)
    loss = nn.functional.cross_entropy(chosen.float(), targets, reduction="sum")
    return {"loss": loss if len(targets) else logits.sum() * 0}  # zero, and yet a gradient for every rank to share
