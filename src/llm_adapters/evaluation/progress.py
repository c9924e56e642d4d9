"""Progress of an evaluation on stderr: questions done, accuracy, tokens per second, time left; warnings in red."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text


def warn(message: str) -> None:
    """Say something on stderr that nobody should overlook."""
    Console(stderr=True).print(Text(f"warning: {message}", style="bold red"), soft_wrap=True)


class EvaluationProgress:
    """A bar per task where stderr is a terminal; elsewhere, if asked for, a line now and then.

    `shown` None means: only on a terminal.
    """

    SECONDS_BETWEEN_LINES = 30.0

    def __init__(self, shown: bool | None = None):
        self._terminal = sys.stderr.isatty()
        self._shown = self._terminal if shown is None else shown
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[score]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not (self._shown and self._terminal),
        )
        self._last = 0.0

    def __enter__(self) -> "EvaluationProgress":
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    def task(self, name: str, total: int) -> None:
        """The next task begins: `total` questions."""
        self._name, self._total, self._done, self._correct = name, total, 0, 0
        self._tokens, self._seconds = 0, 0.0
        self._row = self._bar.add_task(name, total=total, score="")
        self._last = time.monotonic()

    def question(self, correct: bool, tokens: int, seconds: float) -> None:
        """One more question is done; it took `seconds`, which are 0 for one taken up from an earlier attempt."""
        self._done, self._correct = self._done + 1, self._correct + correct
        if seconds:
            self._tokens, self._seconds = self._tokens + tokens, self._seconds + seconds
        rate = f", {self._tokens / self._seconds:.0f} tokens/s" if self._seconds else ""
        score = f"{self._correct / self._done:.1%} right{rate}"
        self._bar.update(self._row, advance=1, score=score)
        time_for_line = time.monotonic() - self._last > self.SECONDS_BETWEEN_LINES or self._done == self._total
        if self._shown and not self._terminal and time_for_line:
            self._last = time.monotonic()
            print(f"{self._name}: {self._done} of {self._total}, {score}", file=sys.stderr, flush=True)
