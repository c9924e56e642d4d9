"""`llm-adapters convert`: a checkpoint of the paper's code becomes a PEFT checkpoint."""

from pathlib import Path


def convert(legacy: Path, output: Path, *, model: str | None = None, json: bool = False) -> None:
    """Turn a checkpoint of the paper's own code into a PEFT checkpoint.

    Args:
        legacy: the folder that the paper's code wrote.
        output: the folder to write.
        model: the base model; the checkpoint is compared with it, and the result names it as its base.
        json: print the result as one JSON document on stdout.
    """
    from llm_adapters import legacy as paper
    from llm_adapters.cli import tables

    written = paper.convert(legacy, output, model=model)
    if json:
        tables.print_json({"adapter": str(written)})
    else:
        print(f"adapter: {written}")
