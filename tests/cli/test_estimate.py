"""How an estimate looks, and what can be asked of it."""

import io
from collections.abc import Callable
from datetime import date
from pathlib import Path

import pytest
from rich.console import Console

from tests.commands import Run
from training_backends import Estimate, Money, PriceSource, TrainingConfig, TrainingRun
from training_backends.cli.views.render import CountView, price_text, show_estimate, show_run
from training_backends.core.estimate import CostItem


def shown(show: Callable[[Console], None]) -> str:
    """Return what is written for people."""
    out = Console(file=io.StringIO(), width=200, highlight=False)
    show(out)
    text: str = out.file.getvalue()  # type: ignore[attr-defined]
    return text


def priced(*amounts: str) -> tuple[CostItem, ...]:
    """Make parts of a cost: training, and more."""
    source = PriceSource(name="a table", as_of=date(2026, 1, 2))
    names = ("training", "storage")
    return tuple(
        CostItem(name=name, amount=Money.model_validate(amount), source=source)
        for name, amount in zip(names, amounts, strict=False)
    )


def test_parts_of_the_cost_are_listed_with_their_sources() -> None:
    """Each part stands by itself below the sum, with where it comes from and its date."""
    text = shown(lambda out: show_estimate(Estimate(costs=priced("3 USD", "12 USD")), out))
    assert "cost      $15.00" in text
    assert "training   $3.00  (a table, 2026-01-02)" in text
    assert "storage   $12.00  (a table, 2026-01-02)" in text


def test_costs_that_cannot_be_added_stand_side_by_side() -> None:
    """Two currencies are named both."""
    estimate = Estimate(costs=priced("3 EUR", "2 USD"))
    assert price_text(estimate) == "3.00 EUR and $2.00"
    assert "cost      3.00 EUR and $2.00" in shown(lambda out: show_estimate(estimate, out))


def test_intervals_stand_behind_what_they_belong_to() -> None:
    """A sampled count and its cost say how sure they are."""
    bounds = (Money.model_validate("1 USD"), Money.model_validate("3 USD"))
    estimate = Estimate(
        data_tokens=2000, interval=(1000, 3000), costs=priced("2 USD"), cost_interval=bounds
    )
    text = shown(lambda out: show_estimate(estimate, out))
    assert "about 2,000 (±50.00%)" in text
    assert "$2.00 (95% interval $1.00 to $3.00)" in text


def test_difference_to_the_quote_is_shown(make_config: Callable[..., TrainingConfig]) -> None:
    """With the quote, and with the run later, stands what had been estimated."""
    ours = Estimate(cost=Money.model_validate("2 USD"))
    quote = Estimate(basis="quote", cost=Money.model_validate("3 USD")).replacing(ours)
    said = "cost: 3.00 USD quoted, 2.00 USD estimated locally (1.00 USD more)"
    assert said in shown(lambda out: show_estimate(quote, out))
    run = TrainingRun(id="r", backend="mistral", config=make_config(), estimate=quote)
    assert said in shown(lambda out: show_run(run, out))


@pytest.mark.parametrize("patience", [0.0, 60.0])
def test_counting_shows_a_bar_only_if_it_takes_long(
    patience: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is done at once needs no bar; the bar is gone in the end."""
    monkeypatch.setattr("training_backends.cli.views.render.PROGRESS_AFTER", patience)
    out = Console(file=io.StringIO(), force_terminal=True, width=100)
    with CountView(quiet=False, out=out) as view:
        view.progress(Path("train.jsonl"), 10, 100)
        view.progress(Path("train.jsonl"), 100, 100)
    text = out.file.getvalue()  # type: ignore[attr-defined]
    assert ("train.jsonl" in text) is (patience == 0.0)


def test_sample_and_exact_exclude_each_other(run: Run, config_file: Path) -> None:
    """Exit code 2."""
    assert run("estimate", config_file.name, "--sample-rows", "50", "--exact").code == 2


def test_sampled_estimate_says_how_sure_it_is(
    run: Run, config_file: Path, train_file: Path
) -> None:
    """--sample-rows counts so many rows; --exact all of them."""
    train_file.write_text(train_file.read_text() * 20)
    config_file.write_text(config_file.read_text().replace("  batch_size: 2\n", ""))
    options = ("-b", "mistral", "--set", "model=open-mistral-7b", "--json")
    sampled = run("estimate", config_file.name, *options, "--sample-rows", "50").document
    exact = run("estimate", config_file.name, *options, "--exact").document
    assert (sampled["basis"], exact["basis"]) == ("sampled", "exact")
    low, high = sampled["interval"]
    assert low <= exact["data_tokens"] <= high
    assert low < sampled["data_tokens"] < high


@pytest.mark.parametrize(("tokens", "has_method"), [(None, False), (7, True)])
def test_an_estimate_without_a_number_has_no_method(
    tokens: int | None, *, has_method: bool
) -> None:
    """How numbers were obtained is shown only if there are any."""
    estimate = Estimate(train_tokens=tokens, notes=("The server reports no price.",))
    text = shown(lambda out: show_estimate(estimate, out))
    assert ("method" in text) is has_method
    assert "The server reports no price." in text
