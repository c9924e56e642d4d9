"""Protocols: all that a measurement fixes beside the questions (prompt, search, limits, the reading of answers).

Scores of different protocols cannot be compared: the name of the protocol belongs to every number.
"""

from dataclasses import dataclass

from llm_adapters.errors import RequestError, unknown
from llm_adapters.tasks.answers import ProtocolName
from llm_adapters.tasks.templates import TemplateName

DEFAULT_TEMPLATE: TemplateName = "alpaca"
DEFAULT_NEW_TOKENS = 256


@dataclass(frozen=True)
class Protocol:
    """Way to measure. None leaves a choice open: to the adapter (`template`) or to the caller (`max_new_tokens`).

    Attributes:
        name: as on the command line.
        extraction: the protocol of `llm_adapters.tasks.answers` that reads the answer.
        num_beams: 1 is greedy decoding.
        template: the prompt template, whose stop ends a response too.
        max_new_tokens: the longest answer, in tokens.
        changes: its differences from the default protocol in words, for every summary.
    """

    name: str
    extraction: ProtocolName
    num_beams: int = 1
    template: TemplateName | None = None
    max_new_tokens: int | None = None
    changes: str = ""

    def resolve(self, template: str | None, max_new_tokens: int | None) -> tuple[str | None, int]:
        """Template and limit to use where the caller asked for these.

        Args:
            template: a template, or None for no wish.
            max_new_tokens: a limit, or None for no wish.

        Returns:
            The template, None for the adapter's own; and the limit.

        Raises:
            RequestError: the protocol fixes what the caller wanted to be otherwise.
        """
        for name, asked, fixed in (
            ("template", template, self.template),
            ("max_new_tokens", max_new_tokens, self.max_new_tokens),
        ):
            if asked is not None and fixed is not None and asked != fixed:
                raise RequestError(
                    f"the protocol {self.name!r} fixes {name}={fixed!r}: leave it out, or change protocol."
                )
        limits = (self.max_new_tokens, max_new_tokens, DEFAULT_NEW_TOKENS)
        return self.template or template, next(limit for limit in limits if limit is not None)


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("default", "default"),
        Protocol("strict", "strict", changes="only an answer that the text declares counts, not the last number"),
        Protocol(
            "paper",
            "paper",
            num_beams=4,
            template="paper",
            max_new_tokens=256,
            changes="as the paper's code: its indented prompt, 4 beams, its answer patterns (last number; first letter "
            "or option anywhere); but with attention mask, eval mode and key-value cache",
        ),
    )
}


def get_protocol(name: str) -> Protocol:
    """Row of the protocol called `name`.

    Args:
        name: one of `PROTOCOLS`.

    Raises:
        RequestError: there is no such protocol.
    """
    if name not in PROTOCOLS:
        raise unknown("protocol", name, PROTOCOLS)
    return PROTOCOLS[name]
