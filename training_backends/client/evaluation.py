"""Ask a trained model the prompts of a data file and score its answers."""

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import anyio
import msgspec
from anyio import to_thread
from pydantic import BaseModel, Field

from training_backends.core.concurrency import run_all
from training_backends.core.errors import BackendNotInstalled, ConfigError, DatasetError, Issue
from training_backends.core.run import ChatMessage, Prompt, Reply
from training_backends.datasets.open_file import opened
from training_backends.datasets.rows import (
    ChatRow,
    ClassifierRow,
    Message,
    PreferenceRow,
    TextRow,
    parse_any_row,
)

__all__ = [
    "EvaluatedRow",
    "Evaluation",
    "Question",
    "Scorer",
    "ask_all",
    "exact_match",
    "matches_schema",
    "read_questions",
    "valid_json",
]

Scorer = Callable[[str, str, str], float]
"""Called with the prompt, the expected and the given answer; returns a score, or a bool."""

_AT_ONCE: Final = 8
"""Questions; rate limits of a provider slow them down further."""
_LIKELY: Final = 0.5
"""Probability from which on one of several labels counts as given."""


class EvaluatedRow(BaseModel, frozen=True):
    """One prompt, the answer to it and its score.

    Attributes:
        line: Line of the data file.
        prompt: The last user message, or the text that a classifier is given.
        messages: All messages that the model was given, if there are others before the last.
        expected: The answer in the data, or the label or labels by target.
        answer: Generated text; None for a classifier.
        labels: For a classifier, the probability of each label by target.
        score: 1 or 0, or what the scorer returns.
    """

    line: int
    prompt: str
    messages: tuple[dict[str, str], ...] | None = None
    expected: str | dict[str, str | list[str]]
    answer: str | None = None
    labels: dict[str, dict[str, float]] | None = None
    score: float = Field(allow_inf_nan=False)


class Evaluation(BaseModel, frozen=True):
    """The scores of a trained model on a data file.

    Attributes:
        rows: The rows that were asked, in order.
        skipped: Rows that cannot be asked, see `AsyncTrainingClient.evaluate`.
    """

    rows: tuple[EvaluatedRow, ...]
    skipped: int = 0

    @property
    def score(self) -> float:
        """The mean of all scores; for scores of 0 and 1, the share of correct answers."""
        return sum(row.score for row in self.rows) / len(self.rows)


class Question(msgspec.Struct, frozen=True):
    """A prompt of a data file with the answer or labels that are expected.

    Attributes:
        messages: The conversation that ends with the prompt, if there is more than the prompt.
    """

    line: int
    prompt: str
    expected: str | dict[str, str | list[str]]
    messages: tuple[ChatMessage, ...] | None = None


class _Completion(msgspec.Struct, frozen=True):
    prompt: str | list[Message] | None = None
    completion: str | list[Message] | None = None


_ROLES: Final[Mapping[str, Literal["system", "user", "assistant"]]] = {
    "developer": "system",
    "system": "system",
    "user": "user",
    "assistant": "assistant",
}
"""Roles of messages in text alone, and as a model is given them."""
_COMPLETION: Final = msgspec.json.Decoder(_Completion)


async def ask_all(
    ask: Callable[[Prompt], Awaitable[Reply]],
    questions: Sequence[Question],
    *,
    scorer: Scorer,
    on_row: Callable[[EvaluatedRow, int], object] | None = None,
) -> list[EvaluatedRow]:
    """Ask several questions at a time and score the answers; see `AsyncTrainingClient.evaluate`."""
    found: dict[int, EvaluatedRow] = {}
    scoring = anyio.CapacityLimiter(1)
    delivered = 0

    async def ask_one(index: int, question: Question) -> None:
        nonlocal delivered
        reply = await ask(question.messages or question.prompt)
        expected, prompt, answer = question.expected, question.prompt, reply.answer or ""
        if isinstance(expected, str):
            work = partial(scorer, prompt, expected, answer)
            score = await to_thread.run_sync(work, limiter=scoring)
        else:
            score = _score_labels(expected, reply)
        found[index] = EvaluatedRow(
            line=question.line,
            prompt=prompt,
            messages=question.messages and tuple({**it} for it in question.messages),
            expected=expected,
            answer=reply.answer,
            labels=reply.labels,
            score=score,
        )
        while delivered in found:
            delivered += 1
            if on_row is not None:
                on_row(found[delivered - 1], len(questions))

    first, *others = [partial(ask_one, *each) for each in enumerate(questions)]
    # Alone, as it may have to load the model.
    await first()
    await run_all(others, at_once=_AT_ONCE)
    return [found[index] for index in range(len(questions))]


def exact_match(prompt: str, expected: str, answer: str) -> bool:
    """Return whether the answer is the expected one, apart from white space."""
    del prompt
    return answer.split() == expected.split()


def valid_json(prompt: str, expected: str, answer: str) -> bool:
    """Return whether the answer is a JSON document."""
    del prompt, expected
    return _document(answer) is not None


def matches_schema(schema: Any) -> Scorer:
    """Return a scorer for answers that must be JSON documents of a schema.

    Raises:
        BackendNotInstalled: jsonschema is not installed.
        ConfigError: The schema is invalid, or refers to other documents.
    """
    try:
        from jsonschema import SchemaError  # noqa: PLC0415  # an extra
        from jsonschema.validators import validator_for  # noqa: PLC0415
        from jsonschema_specifications import REGISTRY  # noqa: PLC0415
        from referencing.exceptions import Unresolvable  # noqa: PLC0415
    except ImportError as error:
        raise BackendNotInstalled(
            "JSON Schemas require jsonschema; install training-backends[eval].",
            install="pip install 'training-backends[eval]'",
        ) from error
    if not isinstance(schema, dict):
        raise ConfigError("The JSON Schema is invalid: it is not an object.")
    kind = validator_for(schema)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise ConfigError(f"The JSON Schema is invalid: {error.message}") from None
    # The default registry would fetch other documents from the network.
    validator = kind(schema, registry=REGISTRY)

    def score(prompt: str, expected: str, answer: str) -> bool:
        del prompt, expected
        found = _document(answer)
        try:
            return found is not None and bool(validator.is_valid(found[0]))
        except Unresolvable as error:
            raise ConfigError(f"The JSON Schema refers to another document: {error}") from None

    return score


def _document(answer: str) -> tuple[Any] | None:
    """Return the document in a tuple, as it may be null."""
    try:
        return (json.loads(answer, parse_constant=_refuse),)
    except (ValueError, RecursionError):
        return None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _score_labels(expected: Mapping[str, str | list[str]], reply: Reply) -> float:
    """Return the share of the expected targets whose labels are right.

    The label of a target is the most probable one. Where several labels are expected, as a list,
    the labels with a probability of at least one half must be exactly these.
    """
    given = reply.labels or {}
    return sum(_is_right(wanted, given.get(name, {})) for name, wanted in expected.items()) / len(
        expected
    )


def _is_right(wanted: str | list[str], given: Mapping[str, float]) -> bool:
    if isinstance(wanted, str):
        return bool(given) and max(given, key=lambda label: given[label]) == wanted
    return {label for label, share in given.items() if share >= _LIKELY} == {*wanted}


def read_questions(
    path: Path, rows: int | None = None, *, chats: bool = True
) -> tuple[list[Question], int]:
    """Return the first `rows` questions of a data file, and how many rows were skipped. Blocking.

    Args:
        chats: The model can be asked with several messages.

    Raises:
        DatasetError: The file cannot be read, a line has no known format, or there is no row that
            can be asked.
    """
    questions: list[Question] = []
    skipped = 0
    with opened(path) as source:
        for number, line in enumerate(source.lines, 1):
            if len(questions) == rows:
                break
            if not line.strip():
                continue
            try:
                question = _question(number, line)
            except msgspec.DecodeError as error:
                issue = Issue(code="invalid_row", message=str(error), path=str(path), line=number)
                raise DatasetError(f"{path} cannot be evaluated.", issues=[issue]) from None
            if question is None or (question.messages and not chats):
                skipped += 1
            else:
                questions.append(question)
    if not questions:
        raise DatasetError(
            f"{path} has no row that can be evaluated.",
            hint="Rows need messages that end with the assistant's answer, `prompt` and "
            "`completion`, or a text and its labels; without tools and images, and for some "
            "backends with one user message only.",
        )
    return questions, skipped


def _question(number: int, line: bytes) -> Question | None:
    """Return the question of a row, or None if it has none, or not in text alone."""
    found = _COMPLETION.decode(line)
    if found.prompt is not None and found.completion is not None:
        return _asked(number, [*_said("user", found.prompt), *_said("assistant", found.completion)])
    match row := parse_any_row(line):
        case ClassifierRow():
            prompt = _classified(row.content)
            # A row without labels has nothing to compare with.
            return Question(number, prompt, row.labels) if prompt and row.labels else None
        case ChatRow():
            return None if row.tools else _asked(number, row.messages)
        case PreferenceRow():
            return _asked(number, [*row.prompt, *row.chosen])
        case TextRow():
            return None


def _asked(number: int, messages: list[Message]) -> Question | None:
    if [message.role for message in messages[-2:]] != ["user", "assistant"]:
        return None
    if any(it.has_other_parts or it.tool_calls or it.role not in _ROLES for it in messages):
        return None
    *before, answered = messages
    prompt = before[-1].text
    if len(before) == 1:
        return Question(number, prompt, answered.text)
    given = tuple(ChatMessage(role=_ROLES[it.role], content=it.text) for it in before)
    return Question(number, prompt, answered.text, given)


def _classified(content: ChatRow | TextRow) -> str | None:
    if isinstance(content, TextRow):
        return content.text
    if [message.role for message in content.messages] != ["user"]:
        return None
    return content.messages[0].text


def _said(role: Any, given: str | list[Message]) -> list[Message]:
    return given if isinstance(given, list) else [Message(role, given)]
