"""What does each step from a plain training loop to ours gain? Prints a table, or one JSON document with --json.

    python benchmarks/steps.py --json
    python benchmarks/steps.py --lengths 256 1024 4096    # instead: tokens per second by the length of a sequence

The job is that of training.py with LoRA and dropout 0.05, in a loop without Trainer. Every row turns one thing on and
keeps what the rows above it have on; each is measured in a process of its own, all in turn.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import common
import training
import training_peers

_FAST_PATHS, _OPS = "llm_adapters.fast_paths", "llm_adapters.ops"
# What a row turns on, and what is put in its place in the rows above it.
STEPS: dict[str, dict[str, Any]] = {
    "plain: transformers and PEFT, 4 examples at a time, padded": {},
    "rows by length, logits at labels only": {},
    "output head and loss in one": {f"{_FAST_PATHS}.session.FastPaths._unfused_reason": lambda *_: "left out"},
    "packs of 1,024 tokens": {f"{_FAST_PATHS}.session._unpacked_reason": lambda *_: "left out"},
    "shared prefix": {"llm_adapters.training.collator._shared": lambda _: 0},
    "LoRA in one function, sparse dropout": {f"{_FAST_PATHS}.lora.base_weight": lambda _: None},
    "RMS norm, SwiGLU, rotary positions": {
        f"{_FAST_PATHS}.rms_norm.match": lambda _: None,
        f"{_FAST_PATHS}.swiglu.match": lambda _: False,
        f"{_FAST_PATHS}.rotary.modelling_file": lambda _: None,
    },
    "memory arena": {f"{_OPS}.cpu.allocator.keep_memory": lambda: False, f"{_OPS}.cpu.allocator.arena": lambda: None},
    "C functions": {f"{_OPS}.backends.disabled": True},
    "packs of 2,688 tokens": {},
}
NAMES = list(STEPS)
WARM_UP = 1


def step(spec: dict) -> dict:
    """One row: all that rows up to `spec["step"]` turn on."""
    import torch
    from peft import get_peft_model
    from transformers import DataCollatorForSeq2Seq

    from llm_adapters.tasks.templates import Encoded
    from llm_adapters.training import Collator, FastPaths

    model, tokenizer, data = training_peers.load(spec)
    model = get_peft_model(model, training_peers.peft_config("lora", 0.05)).train()
    if "length" in spec:
        length, half = spec["length"], spec["length"] // 2
        drawn = torch.randint(0, 40000, (max(2, 12288 // length), length), generator=torch.Generator().manual_seed(0))
        examples = [Encoded(ids, [-100] * half + ids[half:], half) for ids in drawn.tolist()]
        batch = max(1, 4096 // length)
    else:
        examples = [Encoded(row["input_ids"], row["labels"], 0) for row in data["train"]]
        batch = training_peers.BATCH
    at = NAMES.index(spec["step"])
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=training_peers.LEARNING_RATE)
    collate = DataCollatorForSeq2Seq(tokenizer, return_tensors="pt")
    times, tokens = [], []
    with contextlib.ExitStack() as stack:
        for name in NAMES[at + 1 :]:
            for target, replacement in STEPS[name].items():
                stack.enter_context(mock.patch(target, replacement))
        fast = stack.enter_context(FastPaths(model, on=at >= 2))
        limit = 2688 if at >= NAMES.index("packs of 2,688 tokens") else 1024
        collator = Collator(tokenizer.pad_token_id, packed=fast.packs, micro_batch_tokens=limit)
        for start in range(0, len(examples), batch):
            chosen = examples[start : start + batch]
            times.append(time.perf_counter())
            tokens.append(sum(len(e.input_ids) for e in chosen))
            labels = sum(label != -100 for e in chosen for label in e.labels[1:])
            if at == 0:
                for few in (chosen[i : i + 4] for i in range(0, len(chosen), 4)):
                    rows = [{"input_ids": e.input_ids, "labels": e.labels} for e in few]
                    inputs = collate([row | {"attention_mask": [1] * len(row["labels"])} for row in rows])
                    share = (inputs["labels"][:, 1:] != -100).sum() / labels
                    (model(**inputs).loss * share).backward()
            else:
                for micro in collator.make_micro_batches(chosen):
                    (model(**micro.arguments())["loss"] / labels).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        times.append(time.perf_counter())
    return {
        "tokens_per_second": sum(tokens[WARM_UP:]) / (times[-1] - times[WARM_UP]),
        "peak_memory": common.peak_memory(),
    }


def main() -> None:
    if common.worker_main({"step": step}, sys.argv[1:]):
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout instead of a table")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--examples", type=int, default=64, help="a multiple of 16; 32 or more")
    parser.add_argument("--lengths", type=int, nargs="+", help="instead: sequences of so many tokens")
    asked = parser.parse_args()
    if asked.examples % training_peers.BATCH or asked.examples <= WARM_UP * training_peers.BATCH:
        parser.error(
            f"--examples {asked.examples}: a multiple of {training_peers.BATCH}, and more than {training_peers.BATCH}"
        )
    with tempfile.TemporaryDirectory() as temporary:
        job = training.prepare(asked.examples, Path(temporary))
        spec = {"contestant": "step", "model": job["model"], "folder": temporary}

        def run(name: str) -> dict:
            chosen = {"step": NAMES[-1], "length": int(name)} if asked.lengths else {"step": name}
            return common.run_worker(__file__, spec | chosen)

        machine = common.machine()
        results = common.alternate(map(str, asked.lengths) if asked.lengths else NAMES, asked.repeats, run)
    rows = {
        name: {
            "tokens_per_second": common.rounded(common.median(done, "tokens_per_second")),
            "tokens_per_second_each": common.each(done, "tokens_per_second"),
            "peak_memory": common.median(done, "peak_memory"),
            "disturbance_each": common.each(done, "disturbance", 2),
            **({"reason": why} if (why := common.reason(done)) else {}),
        }
        for name, done in results.items()
    }
    if asked.json:
        settings = {
            "examples": asked.examples,
            "repeats": asked.repeats,
            "dropout": 0.05,
            "batch_size": training_peers.BATCH,
        }
        document = {"steps": rows, "versions": common.versions(), "machine": machine, "settings": settings}
        print(json.dumps(document, indent=2))
        return
    head = ["tokens a sequence" if asked.lengths else "turned on", "tokens/s", "peak MB"]
    print(
        common.table(
            [head]
            + [
                [name, str(r["tokens_per_second"]), str(r["peak_memory"] and round(r["peak_memory"] / 1e6))]
                for name, r in rows.items()
            ]
        )
    )


if __name__ == "__main__":
    main()
