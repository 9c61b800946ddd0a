"""What is said of options that a backend does not have."""

from typing import Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

from training_backends.core.options import given_options, option_issues


class Options(BaseModel):
    """Those of some backend."""

    model_config = ConfigDict(extra="forbid")

    max_runs: int = Field(default=1, ge=1)
    device: Literal["cpu", "cuda"] = "cpu"


class Nothing(BaseModel):
    """Those of a backend without any."""

    model_config = ConfigDict(extra="forbid")


@pytest.mark.parametrize(
    ("options", "field", "message", "fix"),
    [
        ({"max_run": 2}, "options.max_run", "unknown option", "did you mean 'max_runs'?"),
        ({"gpus": 2}, "options.gpus", "unknown option", "known options: max_runs, device"),
        ({"max_runs": 0}, "options.max_runs", "greater than or equal to 1", None),
        ({"device": "tpu"}, "options.device", "'cpu' or 'cuda'", None),
        ({"max_runs": True}, "options.max_runs", "expected a number", None),
    ],
)
def test_the_option_is_named_and_what_there_is_instead(
    options: dict[str, Any], field: str, message: str, fix: str | None
) -> None:
    """Names are offered for a name that does not exist, not for a value."""
    (issue,) = option_issues(Options, options)
    assert (issue.field, issue.fix) == (field, fix)
    assert message in issue.message


def test_all_of_them_are_told() -> None:
    """In one go."""
    issues = list(option_issues(Options, {"a": 1, "max_runs": 0}))
    assert sorted(str(issue.field) for issue in issues) == ["options.a", "options.max_runs"]
    assert list(option_issues(Options, {"max_runs": 3})) == []


def test_a_backend_may_have_none() -> None:
    """Which is said."""
    (issue,) = option_issues(Nothing, {"a": 1})
    assert issue.fix == "known options: none"


def test_only_known_options_may_be_left_empty() -> None:
    """A misspelt option is found whether or not it has a value."""
    given = given_options(Options, {"max_runs": None, "max_run": None, "device": "cpu"})
    assert given == {"max_run": None, "device": "cpu"}
