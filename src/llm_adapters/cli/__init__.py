"""The command line: one module per verb, whose typed function and docstring are the options and the help.

Imports of anything heavy are inside the functions that need it, here and in the rest of the package, so that
``llm-adapters --help`` and every verb's help answer at once. A launcher outside the package could print the help and
then import everything plainly; it was weighed and left out. Help is made from the verbs' signatures and docstrings
and from the recipe's dataclasses, so the launcher would need a copy of them, to be kept equal; and a wrong option or
recipe key would still wait seconds for torch before it is told.
"""

import contextlib
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence

from llm_adapters import processes
from llm_adapters._version import __version__
from llm_adapters.errors import Interrupted, RequestError, WorkError, from_system, harmless

DONE, FAILED, WRONG_REQUEST, INTERRUPTED = 0, 1, 2, 130

VERBS = {  # the verb: its module and function
    "demo": "llm_adapters.cli.demo:demo",
    "train": "llm_adapters.cli.train:train",
    "evaluate": "llm_adapters.cli.evaluate:evaluate",
    "results compare": "llm_adapters.cli.results:compare",
    "results spread": "llm_adapters.cli.results:spread",
    "results rescore": "llm_adapters.cli.results:rescore",
    "convert": "llm_adapters.cli.convert:convert",
    "inspect": "llm_adapters.cli.inspect:inspect",
    "data list": "llm_adapters.cli.data:list_sets",
    "data fetch": "llm_adapters.cli.data:fetch",
    "data check": "llm_adapters.cli.data:check",
    "chat": "llm_adapters.cli.chat:chat",
}
MOVED = {  # options that have become verbs
    "evaluate --compare": "results compare FIRST SECOND",
    "evaluate --spread": "results spread FOLDER FOLDER ...",
    "evaluate --rescore": "results rescore FOLDER",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the words after the command's name; None for the process's own.

    Returns:
        The exit code: 0 done, 1 the work failed, 2 the request was wrong, 130 interrupted.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    _quiet_libraries()
    with _Streams(), _one_voice(), _terminated_as_interrupted():
        try:
            code = _run(words)
            sys.stdout.flush()
            return code
        except BrokenPipeError:  # the reader of our output went away (a pager that was closed)
            _discard_stdout()
            return FAILED
        except KeyboardInterrupt:
            print("llm-adapters: interrupted", file=sys.stderr)
            return INTERRUPTED
        except Exception as error:
            if (told := error if isinstance(error, RequestError | WorkError) else from_system(error)) is None:
                raise
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            if not processes.is_told_by_another(error):
                print(f"llm-adapters: {harmless(str(told))}", file=sys.stderr)
            if isinstance(told, Interrupted):
                return INTERRUPTED
            return WRONG_REQUEST if isinstance(told, RequestError) else FAILED


def _run(words: list[str]) -> int:
    from llm_adapters.cli import parser

    function, values = parser.parse(words, VERBS, MOVED, __version__)
    function(**values)
    return DONE


def _quiet_libraries() -> None:
    """What changes in a coming release of a library, or is missing of one that nobody asked for, is for us to know."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|torch")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


class _Streams(contextlib.ExitStack):
    """The standard streams, as they must be: there, and able to show any character (as a replacement, if need be)."""

    def __enter__(self) -> "_Streams":
        super().__enter__()
        for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
            stream = getattr(sys, name)
            if stream is None:  # closed by who called us
                setattr(sys, name, self.enter_context(open(os.devnull, mode, encoding="utf-8")))
                self.callback(setattr, sys, name, None)
            elif hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
        return self


@contextlib.contextmanager
def _one_voice() -> Iterator[None]:
    """Results and notes inside are the first process's; of the others, only errors of their own are shown."""
    if processes.is_first():
        yield
        return
    logging.getLogger().setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM inside is as Ctrl-C."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread: signals are someone else's
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _discard_stdout() -> None:
    """Whatever is still in the buffer goes nowhere, instead of into an error at the interpreter's end."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
