"""The peers of `training.py`, each in a process of its own, and what every contestant is measured by."""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import common

SEED = 42
BATCH = 16  # examples per optimiser step
WARM_UP = 2  # steps that are not timed
LEARNING_RATE = 3e-4

# The fastest of --sweep (LoRA, 64 examples, one run each on a quiet machine; tokens per second):
#   Trainer: padding-free 4: 258, 8: 180; by length 4: 248, 8: 219, 16: 225; random 4: 220.
#   SFT: padding-free 4: 175, 8: 163; by length 4: 207, 8: 174, 16: 125; packs of 512: 180, of 1,024: 188.
# Padding-free gave padding's held-out loss, with transformers' sdpa; TRL supports it with flash attention only.
# Read in TRL's code, not profiled: without Triton its fused output head computes every position, not the labels alone.
P2: dict[str, Any] = {"trainer": "trainer", "layout": "padding_free", "sampling": "random", "micro_batch": 4}


def peft_config(method: str, dropout: float) -> Any:
    if method == "lora":
        from peft import LoraConfig, TaskType

        return LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=32,
            lora_alpha=64,
            lora_dropout=dropout,
            target_modules=["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
        )
    from llm_adapters import BottleneckConfig

    return BottleneckConfig(insertion=method, placement=("mlp",), bottleneck_size=256, bottleneck_dropout=dropout)


class Clock:
    """Notes when each step ended, and how many real tokens each micro-batch held as it was collated."""

    def __init__(self, collate: Any) -> None:
        from transformers import TrainerCallback

        clock = self

        class Callback(TrainerCallback):
            def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
                clock.ends = [(0, time.perf_counter(), time.process_time())]

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                clock.ends.append((state.global_step, time.perf_counter(), time.process_time()))

        self.collate, self.callback = collate, Callback()
        self.ends: list[tuple[int, float, float]] = []
        self.micro_batches: list[int] = []

    def __call__(self, examples: list) -> Any:
        batch = self.collate(examples)
        mask = batch.get("attention_mask")
        self.micro_batches.append(int(batch["input_ids"].numel() if mask is None else mask.sum()))
        return batch

    def result(self, micro_per_step: int) -> dict[str, Any]:
        """Tokens per second after the warm-up; the steps took their micro-batches in the order of collation."""
        (_, start, cpu_start), (_, end, cpu_end) = self.ends[WARM_UP], self.ends[-1]
        tokens = sum(self.micro_batches[WARM_UP * micro_per_step :])
        return {
            "tokens_per_second": tokens / (end - start),
            "tokens_per_cpu_second": tokens / (cpu_end - cpu_start),
            "tokens": sum(self.micro_batches),
            "steps": self.ends[-1][0],
            "seconds": end - self.ends[0][1],
        }


def held_out_loss(model: Any, examples: list[dict]) -> float:
    """Mean cross-entropy per label, by the model's own forward."""
    import torch

    model.eval()
    total = count = 0.0
    with torch.inference_mode():
        for start in range(0, len(examples), 8):
            rows = examples[start : start + 8]
            width = max(len(r["input_ids"]) for r in rows)
            ids = torch.tensor([r["input_ids"] + [0] * (width - len(r["input_ids"])) for r in rows])
            mask = torch.tensor([[1] * len(r["input_ids"]) + [0] * (width - len(r["input_ids"])) for r in rows])
            labels = torch.tensor([r["labels"] + [-100] * (width - len(r["labels"])) for r in rows])[:, 1:]
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
            at = labels != -100
            total += torch.nn.functional.cross_entropy(logits[at].float(), labels[at], reduction="sum").item()
            count += at.sum().item()
    return total / count


def finish(model: Any, data: dict, losses: list[float], result: dict) -> dict:
    """What every contestant reports; memory first, so that the evaluation has no part in it."""
    return {
        **result,
        "peak_memory": common.peak_memory(),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "final_loss": sum(losses[-4:]) / len(losses[-4:]),
        "held_out_loss": held_out_loss(model, data["held_out"]),
    }


def load(spec: dict) -> tuple[Any, Any, dict]:
    """The base model in bfloat16, its tokenizer and the encoded examples."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    set_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.bfloat16)
    return model, tokenizer, json.loads(Path(spec["folder"], "encoded.json").read_text())


def arguments(micro_batch: int, accumulation: int, folder: str) -> dict[str, Any]:
    """The job as TrainingArguments."""
    return {
        "output_dir": folder,
        "num_train_epochs": 1,
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": LEARNING_RATE,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "seed": SEED,
    }


def p1(spec: dict) -> dict:
    """transformers.Trainer and PEFT as their documentation shows it."""
    from datasets import Dataset
    from peft import get_peft_model
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    model, tokenizer, data = load(spec)
    model = get_peft_model(model, peft_config(spec["method"], 0.05))
    collator = Clock(DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8, return_tensors="pt", padding=True))
    rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in data["train"]]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(**arguments(4, BATCH // 4, folder)),
            train_dataset=Dataset.from_list(rows),
            data_collator=collator,
            callbacks=[collator.callback],
        )
        trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return finish(model, data, losses, collator.result(BATCH // 4))


def p2(spec: dict) -> dict:
    """The best that users of TRL, transformers and PEFT get: see `P2` for the settings."""
    from datasets import Dataset
    from peft import get_peft_model

    use = {**P2, **spec.get("use", {})}
    model, tokenizer, data = load(spec)
    # Adapters in the base's precision: no conversions to float32 and back around every product.
    model = get_peft_model(model, peft_config(spec["method"], 0.0), autocast_adapter_dtype=False)
    micro = use["micro_batch"]
    packs = use["layout"] == "packing"
    # A pack of 1,024 tokens holds about 5.5 examples, so that 3 packs are a step.
    accumulation = 3 * 1024 // use["pack"] // micro if packs else BATCH // micro
    with tempfile.TemporaryDirectory() as folder:
        options = arguments(micro, accumulation, folder) | {"train_sampling_strategy": use["sampling"]}
        if use["trainer"] == "sft":
            from trl import SFTConfig, SFTTrainer

            trainer = SFTTrainer(
                model=model,
                args=SFTConfig(
                    **options,
                    max_length=use["pack"] if packs else None,
                    packing=packs,
                    padding_free=use["layout"] == "padding_free",
                    bf16=False,  # the model is bfloat16 already: autocast would only add conversions
                    gradient_checkpointing=False,
                ),
                # `labels` are -100 at the prompt: completion-only loss, on the very ids that the others train on
                train_dataset=Dataset.from_list(data["train"]),
                processing_class=tokenizer,
            )
            # TRL takes no collator from outside with padding-free: its own one is wrapped
            collator = trainer.data_collator = Clock(trainer.data_collator)
            trainer.add_callback(collator.callback)
        else:
            from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, Trainer, TrainingArguments

            collator = Clock(DataCollatorForSeq2Seq(tokenizer, return_tensors="pt", padding=True))
            rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in data["train"]]
            if use["layout"] == "padding_free":
                collator, rows = Clock(DataCollatorWithFlattening()), data["train"]
            trainer = Trainer(
                model=model,
                args=TrainingArguments(**options),
                train_dataset=Dataset.from_list(rows),
                data_collator=collator,
                callbacks=[collator.callback],
            )
        trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return finish(model, data, losses, collator.result(accumulation))
