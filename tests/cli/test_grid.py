"""`launch --grid`: a run for each combination of values."""

import json
from pathlib import Path

import pytest

from tests.cli.answering import AnsweringBackend
from tests.commands import Run
from training_backends import BackendUnavailable, Money

GRID = ("--grid", "hyperparameters.learning_rate=1e-4,2e-4", "--grid", "tuning=lora,{kind: full}")
LAUNCH = ("launch", "run.yaml", "--id", "s", "--yes")


@pytest.fixture(autouse=True)
def configured(tmp_path: Path, answering: AnsweringBackend, train_file: Path) -> AnsweringBackend:
    """Write a configuration with a budget."""
    (tmp_path / "run.yaml").write_text(
        f"backend: answering\nmodel: m\ndata: {{train: {train_file.name}}}\n"
        "budget: {max_cost: 25 USD}\ntags: {team: support}\n"
    )
    return answering


def test_every_combination_is_launched(run: Run) -> None:
    """With an id of its own; the last field varies fastest."""
    done = run(*LAUNCH, *GRID)
    assert (done.code, done.out) == (0, "s-1\ns-2\ns-3\ns-4\n")
    assert "s-2  running  1e-4                           {kind: full}" in done.err
    assert "compare s-1 s-2 s-3 s-4" in done.err


def test_its_runs_have_a_tag(run: Run) -> None:
    """Beside those of the configuration."""
    run(*LAUNCH, *GRID, "--quiet")
    found = json.loads(run("list", "--tag", "grid=s", "--tag", "team=support", "--json").out)
    rates = sorted(each["config"]["hyperparameters"]["learning_rate"] for each in found)
    assert rates == [1e-4, 1e-4, 2e-4, 2e-4]


def test_a_repeated_launch_starts_nothing_twice(run: Run, configured: AnsweringBackend) -> None:
    """It goes on where the first one failed."""
    failing = configured.refusing(BackendUnavailable("gone"))
    configured.before_create = lambda: failing() if len(configured.created) == 2 else None
    first = run(*LAUNCH, *GRID)
    assert (first.code, first.out) == (8, "s-1\ns-2\n")
    assert "2 of 4 runs were launched" in first.err
    configured.before_create = lambda: None
    second = run(*LAUNCH, *GRID, "--json").document
    assert [each["id"] for each in second["runs"]] == ["s-1", "s-2", "s-3", "s-4"]
    assert len(configured.created) == 4


def test_the_budget_is_that_of_the_sum(run: Run, configured: AnsweringBackend) -> None:
    """Each of the four would be within it."""
    configured.price = Money.model_validate("10 USD")
    done = run(*LAUNCH, *GRID)
    assert (done.code, configured.created) == (7, [])
    assert "40.00 USD" in done.err


def test_costs_need_consent_once(run: Run, tmp_path: Path, configured: AnsweringBackend) -> None:
    """To the sum of the estimates."""
    path = tmp_path / "run.yaml"
    path.write_text(path.read_text().replace("budget: {max_cost: 25 USD}", ""))
    configured.price = Money.model_validate("10 USD")
    done = run("launch", "run.yaml", *GRID)
    assert (done.code, configured.created) == (2, [])
    assert "This sweep of 4 runs costs $40.00" in done.err
    assert run(*LAUNCH, *GRID).code == 0


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--grid", "hyperparameters.epochs"], 2, "not FIELD=V1,V2"),
        (["--grid", "hyperparameters.epochs="], 2, "not FIELD=V1,V2"),
        (["--grid", "suffix=a,[b"], 2, "not FIELD=V1,V2"),
        (["--grid", "suffix=a", "--grid", "suffix=b"], 2, "given twice"),
        (
            ["--grid", f"suffix={','.join('abcdefghi')}", "--grid", "method=1,2,3,4,5,6,7,8"],
            2,
            "72",
        ),
        (["--grid", "suffix=a", "--follow"], 2, "`wait`"),
        (["--grid", "hyperparameters.epoch=1,2"], 3, "--grid: hyperparameters.epoch"),
        (["--grid", "hyperparameters.seed=010"], 3, "YAML reads 010 as 8"),
    ],
)
def test_a_grid_that_cannot_be_launched_is_an_error(
    run: Run, configured: AnsweringBackend, words: list[str], code: int, said: str
) -> None:
    """Nothing is started."""
    done = run(*LAUNCH, *words)
    assert (done.code, said in done.err) == (code, True), done.err
    assert configured.created == []
