"""`eval` scores the answers of a trained model."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.answering import AnsweringBackend
from tests.commands import Run
from training_backends import Reply, TrainingConfig, TrainingRun, TrainingStatus
from training_backends.store import RunStore


def chat(question: str, answer: str, **first: str) -> dict[str, Any]:
    """Return a row with one turn, after the messages given by role."""
    turns = {**first, "user": question, "assistant": answer}
    return {"messages": [{"role": role, "content": text} for role, text in turns.items()]}


@pytest.fixture(autouse=True)
def asked(tmp_path: Path, answering: AnsweringBackend) -> AnsweringBackend:
    """Store a completed run, data files and the answers of its model."""
    (tmp_path / "home").mkdir()
    store = RunStore(f"sqlite:///{tmp_path / 'home' / 'runs.db'}")
    given = {"model": "m", "data": {"train": "a.jsonl"}}
    config = TrainingConfig.model_validate(given)
    for run_id, status in (("r", TrainingStatus.COMPLETED), ("failed", TrainingStatus.FAILED)):
        store.insert(TrainingRun(id=run_id, backend="answering", config=config, status=status))
    store.close()
    rows = [
        chat("one", '{"a": 1}'),
        chat("two", "second answer"),
        {"prompt": "three", "completion": "3"},
        {"prompt": [{"role": "user", "content": "four"}], "completion": "4"},
        {"messages": [*chat("six", "6")["messages"], {"role": "user", "content": "and?"}]},
    ]
    write(tmp_path / "test.jsonl", *rows)
    write(
        tmp_path / "labels.jsonl",
        {"text": "meow", "labels": {"animal": "cat", "sound": ["soft", "high"]}},
        {"text": "woof", "labels": {"animal": "dog", "sound": ["loud"]}},
    )
    answering.replies = {
        "one": Reply(answer='{"a": 1}'),
        "two": Reply(answer="  second\n answer "),
        "three": Reply(answer="drei"),
        "four": Reply(answer="4"),
        "meow": Reply(
            labels={"animal": {"cat": 0.9, "dog": 0.1}, "sound": {"soft": 0.8, "high": 0.1}}
        ),
        "woof": Reply(labels={"animal": {"cat": 0.3, "dog": 0.7}, "sound": {"loud": 0.6}}),
    }
    return answering


def write(path: Path, *rows: Any) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def test_answers_are_compared_with_the_data(run: Run) -> None:
    """White space does not count; a row without an answer to the last message is skipped."""
    done = run("eval", "r", "test.jsonl", "--json")
    assert done.document == {
        "run": "r",
        "file": "test.jsonl",
        "scorer": "exact match",
        "rows": 4,
        "skipped": 1,
        "score": 0.75,
    }


def test_the_wrong_answers_are_shown(run: Run) -> None:
    """Those with the lowest scores, and how many rows were skipped."""
    done = run("eval", "r", "test.jsonl")
    assert "score   0.750" in done.out
    assert done.out.splitlines()[-1].split() == ["3", "0.000", "3", "drei"]
    assert "1 row skipped" in done.err


def test_each_answer_is_written(run: Run, tmp_path: Path) -> None:
    """As a line of JSON, in the order of the data."""
    run("eval", "r", "test.jsonl", "--output", "scores.jsonl", "--rows", "3")
    lines = (tmp_path / "scores.jsonl").read_text().splitlines()
    assert [json.loads(line)["score"] for line in lines] == [1, 1, 0]
    assert json.loads(lines[1]) == {
        "line": 2,
        "prompt": "two",
        "expected": "second answer",
        "answer": "  second\n answer ",
        "score": 1.0,
    }


def test_the_last_answer_of_a_conversation_is_compared(
    run: Run, tmp_path: Path, asked: AnsweringBackend
) -> None:
    """The model gets what came before it, as it is in the data."""
    first = [*chat("one", "1", system="Count.")["messages"], *chat("and?", "2")["messages"]]
    write(tmp_path / "talk.jsonl", {"messages": first}, chat("five", "5", developer="Count."))
    asked.replies["system: Count.\nuser: one\nassistant: 1\nuser: and?"] = Reply(answer="2")
    asked.replies["system: Count.\nuser: five"] = Reply(answer="6")
    done = run("eval", "r", "talk.jsonl", "--json", "--output", "out.jsonl")
    assert (done.document["score"], done.document["skipped"]) == (0.5, 0)
    row = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
    assert (row["prompt"], row["messages"], row["expected"]) == ("and?", first[:-1], "2")


def test_a_row_that_is_more_than_text_is_skipped(run: Run, tmp_path: Path) -> None:
    """With tools or images, the answer would be another one."""
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    image = [{"type": "image_url", "image_url": "https://a/b.png"}]
    picture = {"messages": [{"role": "user", "content": image}, *chat("", "2")["messages"][1:]]}
    write(tmp_path / "rich.jsonl", chat("one", "1"), {**chat("one", "1"), "tools": [tool]}, picture)
    assert run("eval", "r", "rich.jsonl", "--json").document["skipped"] == 2


def test_a_backend_for_single_messages_is_asked_no_conversations(
    run: Run, tmp_path: Path, asked: AnsweringBackend
) -> None:
    """Its answer to the last message alone would be to another question."""
    asked._capabilities = asked.capabilities.model_copy(update={"samples_chats": False})
    write(tmp_path / "talk.jsonl", chat("two", "second answer"), chat("two", "2", system="Count."))
    found = run("eval", "r", "talk.jsonl", "--json").document
    assert (found["rows"], found["skipped"], found["score"]) == (1, 1, 1)


def test_labels_of_a_classifier_are_compared(run: Run) -> None:
    """The share of targets whose labels are right."""
    found = run("eval", "r", "labels.jsonl", "--json").document
    assert (found["scorer"], found["score"]) == ("label accuracy", 0.75)


def test_a_json_schema_is_a_scorer(run: Run, tmp_path: Path) -> None:
    """Valid JSON is not enough."""
    schema = {"type": "object", "required": ["a"]}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    shares = [
        run("eval", "r", "test.jsonl", "--json", *words).document["score"]
        for words in (["--valid-json"], ["--json-schema", "schema.json"])
    ]
    assert shares == [0.5, 0.25]


def test_a_function_is_a_scorer(run: Run, tmp_path: Path) -> None:
    """Of a module in the working directory."""
    (tmp_path / "my_scorer_1.py").write_text(
        "def shares(prompt, expected, answer):\n"
        "    return 0.5 if prompt == 'three' else answer.strip() == expected\n"
    )
    found = run("eval", "r", "test.jsonl", "--scorer", "my_scorer_1:shares", "--json").document
    assert (found["scorer"], found["score"]) == ("my_scorer_1:shares", (1 + 0 + 0.5 + 1) / 4)


@pytest.mark.parametrize(("least", "code"), [("0.75", 0), ("0.76", 10)])
def test_a_low_score_is_a_failure(run: Run, least: str, code: int) -> None:
    """A pipeline ends before a model that is worse."""
    assert run("eval", "r", "test.jsonl", "--min-score", least).code == code


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("failed test.jsonl", 9, "Only completed runs"),
        ("r none.jsonl", 3, "none.jsonl"),
        ("r bad.jsonl", 3, "bad.jsonl"),
        ("r texts.jsonl", 3, "no row that can be evaluated"),
        ("r test.jsonl --output test.jsonl", 3, "already exists"),
        ("r test.jsonl --output none/out.jsonl", 3, "Cannot write"),
        ("r test.jsonl --json-schema bad.jsonl", 3, "not JSON"),
        ("r test.jsonl --json-schema wrong.json", 3, "Schema is invalid"),
        ("r test.jsonl --json-schema elsewhere.json", 3, "another document"),
        ("r test.jsonl --scorer nothing:at_all", 2, "Cannot import"),
        ("r test.jsonl --scorer my_scorer_2:fails", 3, "ValueError: no"),
        ("r test.jsonl --scorer my_scorer_2:nan", 3, "returned nan"),
        ("r test.jsonl --valid-json --scorer my_scorer_2:nan", 2, "only one"),
    ],
)
def test_what_cannot_be_scored_is_an_error(
    run: Run, tmp_path: Path, words: str, code: int, said: str
) -> None:
    """It names what to correct."""
    (tmp_path / "bad.jsonl").write_text("{]\n")
    write(tmp_path / "texts.jsonl", {"text": "plain"})
    (tmp_path / "wrong.json").write_text('{"type": 5}')
    (tmp_path / "elsewhere.json").write_text('{"$ref": "http://127.0.0.1:9/schema"}')
    (tmp_path / "my_scorer_2.py").write_text(
        "def fails(*given):\n    raise ValueError('no')\n"
        "def nan(*given):\n    return float('nan')\n"
    )
    done = run("eval", *words.split())
    assert (done.code, said in done.err) == (code, True), done.err


def test_an_output_without_answers_is_not_kept(run: Run, tmp_path: Path) -> None:
    """The same command works once the cause is gone."""
    assert run("eval", "failed", "test.jsonl", "--output", "out.jsonl").code == 9
    assert not (tmp_path / "out.jsonl").exists()


def test_not_a_number_is_not_json(run: Run, tmp_path: Path, asked: AnsweringBackend) -> None:
    """Although Python reads it."""
    write(tmp_path / "one.jsonl", chat("nan", "{}"))
    asked.replies["nan"] = Reply(answer='{"a": NaN}')
    assert run("eval", "r", "one.jsonl", "--valid-json", "--json").document["score"] == 0
