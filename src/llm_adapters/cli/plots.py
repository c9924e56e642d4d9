"""Pictures of runs, as PNG files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def loss_plot(log: Sequence[dict[str, Any]], file: Path, title: str) -> Path:
    """Draw training and validation loss over the steps of a run.

    Args:
        log: the lines of log.jsonl.
        file: the PNG file to write.
        title: printed above it.

    Returns:
        `file`.
    """
    import matplotlib

    matplotlib.use("Agg")  # files only: no screen is needed
    from matplotlib import pyplot

    from llm_adapters.files import atomic

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "validation", "o--")):
        points = [(line["step"], line[key]) for line in log if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label)
    axes.set(xlabel="step", ylabel="cross-entropy per label (nats)", title=title, ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic(file, "wb") as stream:
        figure.savefig(stream, format="png", dpi=150)
    pyplot.close(figure)
    return file
