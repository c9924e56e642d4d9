"""The chat template that a tokenizer brings along: somebody else's program, run within bounds and at a fixed date."""

import contextlib
import os
import select
import signal
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from llm_adapters.compat.transformers import pin_clock
from llm_adapters.errors import RequestError, first_line
from llm_adapters.tasks.examples import Message

DATE = datetime(2024, 7, 26)
"""The date that every template is told, so that a prompt is the same tomorrow: Llama's own falls back to it."""

SECONDS = 10  # to render one conversation
_MEMORY = 1 << 30  # bytes more than the process has
_LONGER = 1_000_000  # characters that a template may add


def render(tokenizer: Any, messages: Sequence[Message], reply: bool = True) -> str:
    """Text of a conversation in the tokenizer's chat template.

    Args:
        tokenizer: has a chat template.
        messages: role and content of each.
        reply: end with the words that begin the assistant's reply.

    Raises:
        RequestError: the template fails, runs on without end, takes too much memory, or leaves a message out.
    """
    text = _within_bounds(tokenizer, tuple(messages), reply)
    for role, content in messages:
        if role != "assistant" and _words(content) not in _words(text):
            raise RequestError(
                f"the tokenizer's chat template leaves out what the {role} says: {content.strip()[:80]!r} is not in "
                f"{text[:80]!r}. It may be made for messages of another form; choose another prompt template."
            )
    return text


def _within_bounds(tokenizer: Any, messages: tuple[Message, ...], reply: bool) -> str:
    template = _attempt(tokenizer.get_chat_template)
    shape = (template, tuple(role for role, _ in messages))
    if shape not in _tried:
        _try_apart(lambda: _render(tokenizer, template, messages, reply))
        _tried.add(shape)
    text = _attempt(lambda: _render(tokenizer, template, messages, reply))
    if len(text) > _LONGER + 10 * sum(len(content) for _, content in messages):
        raise _broken(f"it makes {len(text)} characters of a conversation")
    return text


_tried: set[tuple[str, tuple[str, ...]]] = set()  # templates and the roles of conversations that they render in time


def _render(tokenizer: Any, template: str, messages: tuple[Message, ...], reply: bool) -> str:
    pin_clock(template, DATE)
    conversation = [{"role": role, "content": content} for role, content in messages]
    return str(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=reply))


def _attempt(function: Callable[[], str]) -> str:
    try:
        return function()
    except Exception as error:  # whatever a program of somebody else's raises
        raise _broken(first_line(error)) from None


def _broken(reason: str) -> RequestError:
    return RequestError(
        f"the tokenizer's chat template cannot be rendered ({reason}). Choose another prompt template, or correct it."
    )


def _try_apart(function: Callable[[], object]) -> None:
    """Run `function` in a process of its own, which may be stopped and whose memory is limited, where the system can.

    Raises:
        RequestError: it does not end in `SECONDS`, or the process dies (of too much memory).
    """
    if not hasattr(os, "fork"):
        return
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(reader)
            _limit_memory()
            with contextlib.suppress(Exception):  # the caller's own attempt tells of it
                try:
                    function()
                except MemoryError:
                    os._exit(1)
            os.write(writer, b"done")
        finally:
            os._exit(0)
    os.close(writer)
    ended = bool(select.select([reader], [], [], SECONDS)[0])
    said = os.read(reader, 4) if ended else b""
    os.close(reader)
    if not ended:
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if said != b"done":
        raise _broken(f"it takes more than {SECONDS} seconds" if not ended else "it takes too much memory")


def _limit_memory() -> None:
    """Let this process have `_MEMORY` bytes more than it has, where the system tells how many that are."""
    with contextlib.suppress(OSError, ImportError, ValueError):
        import resource

        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        most = pages * resource.getpagesize() + _MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _words(text: str) -> str:
    return " ".join(text.split())
