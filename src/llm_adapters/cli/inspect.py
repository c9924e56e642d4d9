"""`llm-adapters inspect`: an adapter's places and costs, from a model's config alone."""

from typing import Any


def inspect(
    model: str, *, method: str | None = None, options: dict[str, Any] | None = None, json: bool = False
) -> None:
    """Show where adapters would go on a model, how many parameters and how much memory, without loading its weights.

    Args:
        model: a folder, a short name or a hub id.
        method: the method to place: lora, series, parallel, ...
        options: the method's options, as a mapping ('{r: 8}').
        json: print the result as one JSON document on stdout.
    """
    from llm_adapters import inspection
    from llm_adapters.cli import tables

    found = inspection.inspect(model, method, **(options or {}))
    if json:
        tables.print_json(found.to_dict())
    else:
        tables.show_inspection(found)
