"""Generation by transformers' own `generate`, for the families and methods that the engine does not take.

Batches are padded on the left, and attention mask and position ids always say so: in float32 an answer does not depend
on its neighbours.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList

from llm_adapters.fast_paths.routing import prompt_learning
from llm_adapters.generation.decoding import require_numbers
from llm_adapters.generation.sampling import with_noise
from llm_adapters.generation.sampling_params import SamplingParams


@torch.inference_mode()
def generate_batch(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    pad: int,
    stop_token_ids: Sequence[int],
    max_new_tokens: int,
    num_beams: int,
    sampling: Sequence[SamplingParams | None] = (),
) -> list[list[int]]:
    """Generate after each of `prompts`.

    Args:
        model: a transformers model or a `PeftModel`, in eval mode.
        prompts: token ids, none empty.
        pad: the token to pad with.
        stop_token_ids: the tokens that end an answer.
        max_new_tokens: the longest answer.
        num_beams: 1 for greedy decoding, and for sampling.
        sampling: of each prompt, None for greedy decoding; none where nothing is sampled.

    Returns:
        New tokens for each prompt, the stop token included where there is one.
    """
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        do_sample=False,
        pad_token_id=pad,
        eos_token_id=list(stop_token_ids),
    )
    generator, inputs = _inputs(model, ids, mask)
    processors = LogitsProcessorList([_numbers, *([_Sampled(sampling)] if any(sampling) else [])])
    sequences = generator.generate(**inputs, generation_config=config, logits_processor=processors)
    given = 0 if "inputs_embeds" in inputs else longest
    rows = []
    for sequence in sequences[:, given:].tolist():
        stop = next((at for at, token in enumerate(sequence) if token in stop_token_ids), len(sequence))
        rows.append(sequence[: stop + 1])
    return rows


def _inputs(model: Any, ids: "torch.Tensor", mask: "torch.Tensor") -> "tuple[Any, dict[str, torch.Tensor]]":
    """The model to call `generate` of, and its inputs, so that the positions are right.

    Position ids come from the mask, in transformers' `generate`. PEFT drops them for prompt tuning and p-tuning, and
    puts the learned embeddings before the padding; there the base model is given the embeddings, padding first.
    """
    peft = prompt_learning(model)
    if peft is None or peft.peft_type.value in ("PREFIX_TUNING", "CARTRIDGE"):
        return model, {"input_ids": ids, "attention_mask": mask}
    words = model.word_embeddings(ids)
    learned = model.get_prompt(batch_size=len(ids)).to(words.dtype)
    virtual = learned.shape[1]
    embeddings = torch.cat((words.new_zeros(len(ids), virtual, words.shape[2]), words), dim=1)
    longer = torch.cat((mask.new_zeros(len(ids), virtual), mask), dim=1)
    for row, start in enumerate((longer.shape[1] - longer.sum(1)).tolist()):
        embeddings[row, start - virtual : start] = learned[row]
        longer[row, start - virtual : start] = 1
    return model.get_base_model(), {"inputs_embeds": embeddings, "attention_mask": longer}


class _Sampled:
    """The engine's sampling as a logits processor of a greedy `generate`, which calls it once for each token."""

    def __init__(self, sampling: Sequence[SamplingParams | None]) -> None:
        self._sampling, self._step = sampling, 0

    def __call__(self, _: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        counts = torch.full((len(scores), 1), self._step, device=scores.device)
        self._step += 1
        return with_noise(self._sampling, counts, scores[:, None])[:, 0]


def _numbers(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    require_numbers(scores)
    return scores
