"""Progress of a training for a person: a bar, the loss, tokens per second and the time left, on stderr."""

import sys
from typing import Any


class TrainingProgress:
    """A progress bar on a terminal, and a line per log entry elsewhere (in a file, under CI).

    Args:
        steps: optimiser steps of the whole run.
    """

    def __init__(self, steps: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = Console(stderr=True)
        self.steps = steps
        self.loss = ""
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not sys.stderr.isatty(),
        )
        self.task = self.bar.add_task("training", total=steps, numbers="")

    def __enter__(self) -> "TrainingProgress":
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def step(self, step: int, tokens_per_second: float) -> None:
        """Move to `step`."""
        self.bar.update(self.task, completed=step, numbers=f"{self.loss} {tokens_per_second:.0f} tokens/s")

    def log(self, line: dict[str, Any]) -> None:
        """Show a log line's loss; as a line of its own where there is no terminal."""
        if "loss" in line:
            self.loss = f"loss {line['loss']:.3f}"
        if not self.bar.disable:
            return
        kind, loss = ("loss", line["loss"]) if "loss" in line else ("validation loss", line.get("eval_loss"))
        if loss is not None:
            rate = line["tokens_per_second"]
            left = line["seconds"] / max(line["step"], 1) * (self.steps - line["step"])
            print(
                f"step {line['step']}/{self.steps}  {kind} {loss:.4f}  {rate:.0f} tokens/s  {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )
