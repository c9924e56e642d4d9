"""The layers of the package, from the top down, and which module imports which (read from the source, not imported)."""

import ast
from collections.abc import Iterator
from pathlib import Path

import llm_adapters

SOURCE = Path(llm_adapters.__file__).parent

# A module may import those of its own group and of any layer below. Groups of one layer know nothing of each other.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("cli", "serving"),
    ("studies",),
    ("api",),
    ("training", "evaluation", "inspection"),
    ("generation",),
    ("fast_paths",),
    ("legacy",),
    ("models",),
    ("runs", "methods"),
    ("ops", "tasks"),
    ("fusion",),
    ("bottleneck",),
    ("architectures", "adapter_files"),
    ("_registration",),  # besides, it loads the tuners by name when PEFT is imported
    ("documents",),
    ("compat", "files", "processes"),
    ("errors", "_version", "_lazy"),
)


def modules() -> dict[str, Path]:
    """Source file of each module below `llm_adapters`, by its dotted name; the package's own `__init__` is left out."""
    found = {}
    for file in SOURCE.rglob("*.py"):
        parts = file.relative_to(SOURCE).with_suffix("").parts
        if name := ".".join(parts[:-1] if parts[-1] == "__init__" else parts):
            found[name] = file
    return found


def imports(name: str, file: Path, known: set[str]) -> Iterator[str]:
    """Modules of this package that `file` imports, inside functions too; not those for type checkers alone."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for part in node.body
        for inner in ast.walk(part)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            targets = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            if target.startswith("llm_adapters."):
                inside = target.removeprefix("llm_adapters.")
                here = inside if inside in known else inside.rpartition(".")[0]
                if here and here != name:
                    yield here
