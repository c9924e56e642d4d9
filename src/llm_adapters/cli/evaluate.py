"""`llm-adapters evaluate`: scores of a run, an adapter or a bare model."""

from pathlib import Path
from typing import Literal

from llm_adapters.compat.jsonargparse import Count, NotNegative, Positive, Seed
from llm_adapters.errors import RequestError
from llm_adapters.tasks.answers import ProtocolName
from llm_adapters.tasks.templates import TemplateName


def evaluate(
    run: str | None = None,
    *,
    model: str | None = None,
    adapter: Path | None = None,
    tasks: list[str] | None = None,
    limit: Count | None = None,
    protocol: ProtocolName = "default",
    template: TemplateName | None = None,
    batch_size: Count | None = None,
    max_new_tokens: Count | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    device: str = "auto",
    quantization: Literal["auto", "nf4", "int8"] | None = "auto",
    output: Path | None = None,
    check_invariance: int = 0,
    allow_untrained: bool = False,
    allow_other_base: bool = False,
    samples: Count = 1,
    temperature: NotNegative = 0.0,
    top_p: Positive = 1.0,
    top_k: int = 0,
    seed: Seed = 0,
    html: bool = False,
    json: bool = False,
) -> None:
    """Measure a run, an adapter on a base model, or the bare base model on test sets.

    Args:
        run: a run folder.
        model: a base model instead: a folder, a short name or a hub id.
        adapter: an adapter's folder, to go on the model.
        tasks: test sets of the catalogue, or task files.
        limit: the first so many questions of each.
        protocol: default (the declared answer, else the last), strict (only a declared one) or paper (its rules).
        template: the prompt template; by default the one that the adapter was trained with.
        batch_size: questions answered at once; chosen by free memory if not given.
        max_new_tokens: the longest answer, in tokens; 256 if not given.
        dtype: precision; auto is bfloat16 where the hardware multiplies it natively, else float32.
        device: the device to run on; auto takes an accelerator if there is one.
        quantization: store the base's weights in fewer bits; auto does as when the adapter was trained.
        output: the folder for records and summary; a run's own folder if not given.
        check_invariance: answer so many questions again, alone and in float32, and report how many scores flip.
        allow_untrained: measure an adapter that does nothing, too.
        allow_other_base: measure an adapter on other weights than those that it was trained on, too.
        samples: answers to each question, for pass@k and their majority vote; needs a temperature.
        temperature: 0 takes the most probable token; above 0, tokens are drawn, the more evenly the higher it is.
        top_p: draw from the most probable tokens that together have this probability.
        top_k: draw from so many most probable tokens; 0 for all.
        seed: of the random numbers: the same seed gives the same answers.
        html: write errors.html beside the records, a page to read questions, outputs and answers in.
        json: print the result as one JSON document on stdout.
    """
    if (run is None) == (model is None):
        raise RequestError("name either a run folder or --model, and not both")
    if run is not None and adapter is not None:
        raise RequestError("a run has its own adapter: give --adapter only with --model")
    if not tasks:
        raise RequestError("no tasks given: name at least one after --tasks, such as gsm8k or wordproblems")
    if html and not (run or output):
        raise RequestError("--html needs a folder for the page: give --output")

    from llm_adapters import evaluation, processes
    from llm_adapters.cli import tables
    from llm_adapters.evaluation.report import write_report

    result = evaluation.evaluate(
        run or model or "",
        adapter,
        tasks=tasks,
        limit=limit,
        protocol=protocol,
        template=template,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        dtype=dtype,
        device=device,
        quantization=quantization,
        output=output,
        check_invariance=check_invariance,
        allow_untrained=allow_untrained,
        allow_other_base=allow_other_base,
        samples=samples,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
    )
    if html and (folder := result.folder):
        processes.once(lambda: write_report(folder))
    if json:
        tables.print_json(result.to_dict())
    else:
        tables.show_evaluation(result)
