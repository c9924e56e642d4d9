"""Conversations in data: the messages of a row, and the example that they are."""

from typing import Any

from llm_adapters.errors import RequestError
from llm_adapters.tasks.examples import Example, Message

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}


def read_messages(value: Any, where: str) -> list[Message]:
    """Messages of a conversation: objects with ``role`` and ``content``, or ``from`` and ``value``.

    Args:
        value: the list of a row.
        where: file, row and column, for messages.

    Raises:
        RequestError: something else, or a message that is no text of the system, the user or the assistant.
    """
    if not isinstance(value, list) or not value:
        raise RequestError(f"{where} must hold a list of messages, such as {{role: user, content: Hello}}.")
    return [_message(message, where) for message in value]


def read_history(value: Any, where: str) -> list[Message]:
    """Turns before a question: pairs of what the user and the assistant said, or messages.

    Args:
        value: the list of a row; empty or null for none.
        where: file, row and column, for messages.

    Raises:
        RequestError: something else.
    """
    if not value:
        return []
    if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
        return read_messages(value, where)
    pairs = [list(turn) for turn in value if isinstance(turn, list | tuple)] if isinstance(value, list) else []
    if (
        not pairs
        or len(pairs) < len(value)
        or not all(len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in pairs)
    ):
        raise RequestError(
            f"{where} must hold the turns before, each as [what the user said, what the assistant said]."
        )
    return [message for user, assistant in pairs for message in (("user", user), ("assistant", assistant))]


def as_example(messages: list[Message], answer: str, where: str) -> Example:
    """Example of a conversation: the last question is what the user says last, and the response answers it.

    Args:
        messages: all of them; the last is the assistant's response, or the user's question where none is needed.
        answer: the gold label, empty for none.
        where: file and row, for messages.

    Raises:
        RequestError: the user says nothing before the response.
    """
    turns = list(messages)
    response = turns.pop()[1] if turns[-1][0] == "assistant" else ""
    if not turns or turns[-1][0] != "user":
        raise RequestError(f"{where}: a conversation must end in a question of the user and the assistant's response.")
    question = turns.pop()[1]
    if any(role == "system" for role, _ in turns[1:]):
        raise RequestError(f"{where}: a system message must be the first message.")
    return Example(question, response=response, answer=answer, history=tuple(turns))


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise RequestError(f"{where} must hold messages, such as {{role: user, content: Hello}}, not {message!r:.60}.")
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        content = "".join(part["text"] for part in content)
    if role not in _ROLES:
        raise RequestError(f"{where} has a message of the role {role!r}: system, user and assistant can be trained on.")
    if not isinstance(content, str):
        raise RequestError(f"{where} has a message whose content is no text: {content!r:.60}.")
    return _ROLES[role], content
