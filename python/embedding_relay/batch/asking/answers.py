"""What an answer means for its row."""

from __future__ import annotations

from typing import Any, Final

from embedding_relay.batch.asking.replies import Answered, sentence
from embedding_relay.batch.tasks import Outcome, Result, Task

# Beyond it is no number of tokens, and the sum over all rows could not be kept.
MOST_TOKENS: Final = 2**40


def result_of(task: Task, reply: Answered) -> Result:
    """Done with what there is; failed when there is nothing that a person could use."""
    text, problem = _text_of(reply.body)
    if task.body is not None:
        # Whoever wrote the request reads the whole answer: tool calls and embeddings have no text.
        problem = _error_in(reply.body)
    prompt_tokens, completion_tokens = _tokens(reply.body)
    return Result(
        task.row,
        Outcome.FAILED if problem else Outcome.DONE,
        answer=text,
        error=problem,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        http_status=reply.status,
        custom_id=task.custom_id,
        response=reply.body if task.body is not None else None,
    )


def failure(task: Task, reason: str, http_status: int = 0, response: dict[str, Any] | None = None) -> Result:
    return Result(
        task.row,
        Outcome.FAILED,
        error=reason,
        http_status=http_status,
        custom_id=task.custom_id,
        response=response if task.body is not None else None,
    )


def _text_of(body: dict[str, Any]) -> tuple[str, str]:
    """The text, and why it is no answer if it is none."""
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return "", _error_in(body) or "the answer of the endpoint has no choices"
    choice = choices[0]
    message = choice.get("message")
    if not isinstance(message, dict):
        text = choice.get("text")  # of /v1/completions
        return (text, "") if isinstance(text, str) else ("", "the answer of the endpoint has no message")
    text = _joined(message.get("content"))
    if text:
        return text, ""
    return "", _why_empty(message, choice.get("finish_reason"))


def _why_empty(message: dict[str, Any], finish_reason: object) -> str:
    if refusal := message.get("refusal"):
        return f"the model refused: {refusal}"
    if finish_reason == "length":
        thinking = " while it was still thinking" if message.get("reasoning_content") else ""
        return f"the answer is empty: the limit of tokens was reached{thinking}; allow more with max_tokens"
    if message.get("tool_calls"):
        return "the model answered with a call of a tool, not with text"
    # An empty text is what the model chose to say; a missing one is not.
    return "" if isinstance(message.get("content"), str) else "the answer of the endpoint has no text"


def _joined(content: object) -> str:
    """A string, or a list of parts of which some are text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    texts = (part.get("text") for part in content if isinstance(part, dict))
    return "".join(text for text in texts if isinstance(text, str))


def _error_in(body: dict[str, Any]) -> str:
    """Some endpoints send their errors with a status of success."""
    return f"the endpoint answered with an error: {sentence(body, b'')}" if body.get("error") else ""


def _tokens(body: dict[str, Any]) -> tuple[int, int]:
    usage = body.get("usage")
    if not isinstance(usage, dict):
        return 0, 0
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    return _count(prompt), _count(completion)


def _count(value: object) -> int:
    return value if isinstance(value, int) and 0 < value < MOST_TOKENS else 0
