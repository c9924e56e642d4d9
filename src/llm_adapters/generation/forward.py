"""One forward of generation through a model whose fast paths are on, and the trial that says if it may be used."""

import inspect
from typing import Any

import torch

from llm_adapters.fast_paths import attention, routing, trial
from llm_adapters.fast_paths.session import FastPaths
from llm_adapters.ops.kv_cache import DecodeBatch, ForwardBatch, PagedCache
from llm_adapters.ops.packing import Pack


def forward_logits(fast_paths: FastPaths, batch: ForwardBatch, input_tokens: torch.Tensor) -> torch.Tensor:
    """Logits of one forward; its keys and values go to the batch's cache.

    Args:
        fast_paths: the model's, on.
        batch: the row that is computed.
        input_tokens: (decoded tokens,), int64: those of the batch's `decodes`.

    Returns:
        (decoded tokens + prompts, vocabulary): what follows each decoded token, and then each prompt.
    """
    base = fast_paths.base
    ids, chosen = input_tokens, torch.arange(len(input_tokens), device=input_tokens.device)
    positions = torch.cat([input_tokens[:0], *(decode.positions.flatten() for decode in batch.decodes)])
    if (pack := batch.prefills) is not None:
        ids = torch.cat((ids, pack.input_ids[0, pack.prefix :]))
        positions = torch.cat((positions, pack.position_ids[0, pack.prefix :]))
        last = torch.tensor(pack.lengths, device=input_tokens.device).cumsum(0) - 1
        chosen = torch.cat((chosen, len(input_tokens) + last))
    if fast_paths.route is not None:
        fast_paths.route.set(batch.adapters())
    kwargs: dict[str, Any] = {
        "attention_mask": attention.mask_of(batch, ids.device),
        "use_cache": False,
    }
    selects = "logits_to_keep" in inspect.signature(type(base).forward).parameters
    if selects:
        kwargs["logits_to_keep"] = chosen
    logits = base(input_ids=ids[None], position_ids=positions[None], **kwargs).logits[0]
    return logits if selects else logits[chosen]


def learned_prefix(model: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of prefix tuning, a pair (key-value heads, tokens, head_dim) a layer; of other models none."""
    if not routing.is_prefix_tuning(model):
        return []
    dtype = model.get_base_model().dtype
    return [(layer.keys[0].to(dtype), layer.values[0].to(dtype)) for layer in model.get_prompt(batch_size=1).layers]


@torch.inference_mode()
def unsupported_reason(fast_paths: FastPaths) -> str | None:
    """Reason why the engine cannot be used; None where it can.

    It is tried (see `fast_paths.trial`): sequences in pieces (the shared prefix, a prompt, one token, two tokens)
    against the model's own forward over all of each.
    """
    if not fast_paths.packs:
        return fast_paths.report["packing"]
    some, adapters = trial.probe_sequences(fast_paths.base), fast_paths.adapter_count
    indices = [seq % len(some) for seq in range(max(len(some), adapters))]
    try:
        with trial.shortened(fast_paths.base):
            found = _in_pieces(fast_paths, [some[index] for index in indices], prefix=2, steps=(1, 2))
        probes = [fast_paths.probe[seq % adapters][index] for seq, index in enumerate(indices)]
        own, reference = (
            torch.cat([one.points["logits"][-len(logits) :] for one, logits in zip(traces, found, strict=True)])
            for traces in ([p.own for p in probes], [p.reference for p in probes])
        )
        return trial.mismatch(torch.cat(found), own, reference, trial.has_experts(fast_paths.base))
    except Exception as error:  # families differ in more ways than can be listed
        return f"its forward does not take the engine's batches ({type(error).__name__})"


def _in_pieces(
    fast_paths: FastPaths, sequences: list[list[int]], prefix: int, steps: tuple[int, ...]
) -> list[torch.Tensor]:
    """Logits of the last tokens of `sequences`, one after the other by another adapter, through the cache.

    Args:
        fast_paths: the model's, on.
        sequences: begin with the same `prefix` tokens.
        prefix: tokens of the shared prefix.
        steps: the numbers of tokens that are decoded at a time, after the prompt.

    Returns:
        For each sequence (1 + sum of steps, vocabulary).
    """
    device, adapters, decoded = fast_paths.base.device, fast_paths.adapter_count, sum(steps)
    cache = PagedCache(len(sequences), max(map(len, sequences)), device)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    seqs = tuple(range(len(sequences)))
    found = [none] * len(sequences)
    for adapter in range(adapters):
        shared = Pack.of([sequences[0][:prefix]], device=device)
        forward_logits(fast_paths, ForwardBatch(cache, (), shared, None, adapter), none)
        own = seqs[adapter::adapters]
        pack = Pack.of([sequences[seq][:-decoded] for seq in own], prefix, device)
        for seq in own:
            cache.reserve(seq, len(sequences[seq]) - prefix)
        logits = forward_logits(fast_paths, ForwardBatch(cache, (), pack, own, adapter), none)
        for seq, row in zip(own, logits, strict=True):
            found[seq] = row[None]
    tokens = torch.tensor([sequence[-decoded:] for sequence in sequences], device=device)
    lengths = torch.tensor([[len(sequence)] for sequence in sequences], device=device)
    positions = lengths - decoded + torch.arange(decoded, device=device)
    for at, part in zip(positions.split(steps, 1), tokens.split(steps, 1), strict=True):
        decode = DecodeBatch(seqs, at, at >= 0, tuple(seq % adapters for seq in seqs))
        logits = forward_logits(fast_paths, ForwardBatch(cache, [decode]), part.flatten()).view(*at.shape, -1)
        found = [torch.cat(pair) for pair in zip(found, logits, strict=True)]
    return found
