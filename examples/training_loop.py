"""The whole method as a flat loop: a series adapter on a frozen model, the loss on the answers alone, one fast path on.

    python examples/training_loop.py [MODEL] [STEPS]

MODEL is a folder or a name of the hub (SmolLM2-135M). `llm-adapters train` does the same with packs, checkpoints,
and a record of what ran; here every step is in sight.
"""

import sys

import torch
from peft import PeftModel, get_peft_model
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_adapters import BottleneckConfig
from llm_adapters.fast_paths import FastPaths

PROMPT = "### Instruction:\n{question}\n\n### Response:\n"
BATCH, MAX_LENGTH, IGNORED = 8, 128, -100


def questions(count: int, seed: int) -> list[tuple[str, str]]:
    """Make questions and their answers."""
    numbers = torch.randint(2, 100, (count, 2), generator=torch.Generator().manual_seed(seed)).tolist()
    return [(f"Ann has {a} pens and buys {b} more. How many has she?", f"The answer is {a + b}.") for a, b in numbers]


def encode(tokenizer, question: str, answer: str) -> tuple[list[int], list[int]]:
    """Token ids of prompt and answer, and as labels those of the answer: the prompt is not to be learnt."""
    prompt = tokenizer(PROMPT.format(question=question), add_special_tokens=False).input_ids
    target = [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    return (prompt + target)[:MAX_LENGTH], ([IGNORED] * len(prompt) + target)[:MAX_LENGTH]


def pad(rows: list[list[int]], filler: int) -> torch.Tensor:
    """Rows filled up on the right: (batch, longest)."""
    longest = max(len(row) for row in rows)
    return torch.tensor([row + [filler] * (longest - len(row)) for row in rows])


def train(model: PeftModel, tokenizer, steps: int, learning_rate: float = 1e-3) -> list[float]:
    """Train the adapter in place; the loss of each step, in nats per token of the answers."""
    data = [encode(tokenizer, *pair) for pair in questions(BATCH * steps, seed=0)]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]  # the adapter's, no others
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    losses = []
    model.train()
    for step in range(steps):
        batch = data[step * BATCH : (step + 1) * BATCH]
        input_ids = pad([ids for ids, _ in batch], filler=tokenizer.pad_token_id or 0)
        mask = pad([[1] * len(ids) for ids, _ in batch], filler=0)
        labels = pad([labels for _, labels in batch], filler=IGNORED)
        logits = model(input_ids=input_ids, attention_mask=mask).logits  # (batch, longest, vocabulary)
        # The logits at a position are for the token after it.
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main(name: str = "HuggingFaceTB/SmolLM2-135M", steps: str = "20") -> None:
    """Train an adapter for MODEL and write it to `adapter`."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(name)
    base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    model = get_peft_model(base, BottleneckConfig(insertion="series", bottleneck_size=64))
    with FastPaths(model) as fast:  # norms, the gated MLP and the adapter, where they give the model's own results
        print(*(f"{path}: {state}" for path, state in fast.report.items()), sep="\n")
        print(*(f"loss {loss:.3f}" for loss in train(model, tokenizer, int(steps))), sep="\n")
    model.save_pretrained("adapter")


if __name__ == "__main__":
    main(*sys.argv[1:])
