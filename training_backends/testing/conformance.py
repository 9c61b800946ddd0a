"""Checks that every backend must pass, for any test runner.

A backend's tests provide a `Subject`. Its hooks change the provider without going through the
backend, so that the code under test never proves itself.
"""

import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import anyio

from training_backends.core.data_rules import RowFormat
from training_backends.datasets.inspect import inspect
from training_backends.testing.behaviour_checks import BehaviourChecks
from training_backends.testing.launch_checks import LaunchChecks
from training_backends.testing.observe_checks import ObserveChecks
from training_backends.testing.subject import CheckSkipped, LoopbackSubject, Subject, expect

__all__ = ["BackendConformance", "CheckSkipped", "LoopbackSubject", "Report", "Subject"]

_FORMATS: Mapping[str, frozenset[RowFormat]] = MappingProxyType(
    {
        "sft": frozenset({"messages", "text", "completion"}),
        "dpo": frozenset({"preference", "chosen"}),
        "classifier": frozenset({"labels"}),
    }
)
"""Row formats of each method."""


@dataclass(slots=True)
class Report:
    """The result of all checks; as text, one line for each.

    Attributes:
        failed: What was expected, by check.
        skipped: The reason, by check.
    """

    passed: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether no check failed; some may have been skipped."""
        return not self.failed

    def __str__(self) -> str:
        counts = (len(self.passed), len(self.failed), len(self.skipped))
        lines = ["{} passed, {} failed, {} skipped".format(*counts)]
        for title, reasons in (("FAILED", self.failed), ("skipped", self.skipped)):
            for name, reason in reasons.items():
                short = textwrap.shorten(reason, 300, placeholder=" …")
                lines.append(f"{title:8}{_readable(name)}: {short}")
        lines.extend(f"passed  {_readable(name)}" for name in self.passed)
        return "\n".join(lines)


class BackendConformance(LaunchChecks, ObserveChecks, BehaviourChecks):
    """The checks; each raises AssertionError with what was expected.

    Args:
        make_subject: Creates a new subject, for each check.
    """

    def __init__(self, make_subject: Callable[[], Subject]) -> None:
        self._make = make_subject

    @classmethod
    def checks(cls) -> list[str]:
        """Return the names of all checks."""
        return [name for name in dir(cls) if name.startswith("check_")]

    async def run(self, name: str) -> None:
        """Run one check on a new subject, then close the subject.

        Raises:
            CheckSkipped: The check does not apply, or needs a hook that the subject lacks.
            AssertionError: The backend does not conform.
        """
        subject = self._make()
        check: Any = getattr(self, name)
        try:
            with anyio.move_on_after(subject.patience) as scope:
                await check(subject)
        finally:
            await subject.aclose()
        expect(not scope.cancelled_caught, f"the check to finish within {subject.patience:g} s")

    async def run_all(self) -> Report:
        """Run all checks, one after the other."""
        report = Report()
        for name in self.checks():
            try:
                await self.run(name)
            except CheckSkipped as skipped:
                report.skipped[name] = str(skipped)
            except Exception as error:  # a backend may raise anything
                report.failed[name] = str(error) if _is_ours(error) else repr(error)
            else:
                report.passed.append(name)
        return report

    async def check_validate_changes_nothing(self, subject: Subject) -> None:
        """A valid configuration has no errors, and validation creates no job."""
        report = await subject.backend.validate(subject.config, subject.dataset)
        expect(report.ok, f"no errors, not {report.errors}")
        expect(not subject.job_ids(), "no job created by validate")

    async def check_provider_format_fits_the_methods(self, subject: Subject) -> None:
        """The provider format covers each method, and accepts the test data."""
        capabilities = subject.backend.capabilities
        if not capabilities.inspects:
            raise CheckSkipped("the backend takes data of any content")
        formats = {*capabilities.provider_format.formats}
        for method in capabilities.methods:
            expect(bool(_FORMATS.get(method, formats) & formats), f"a row format for {method}")
        found = inspect(subject.config, provider_format=capabilities.provider_format)
        expect(not found.errors, f"data that is valid for the backend, not {found.errors}")

    async def check_tolerated_rows_are_what_the_options_say(self, subject: Subject) -> None:
        """The fraction of invalid rows set in the options is the one that is tolerated."""
        backend = subject.backend
        options = backend.options_tolerating(0.25)
        wanted = 0.25 if options else 0.0
        merged = {**subject.config.options, **options}
        config = subject.config.model_copy(update={"options": merged})
        found = backend.tolerated_bad_rows(config)
        expect(found == wanted, f"{wanted} of the rows tolerated, not {found}")
        backend.options_model.model_validate(merged)

    async def check_estimate_gives_reasons(self, subject: Subject) -> None:
        """An estimate explains what it does not know."""
        estimate = await subject.backend.estimate(subject.config, subject.dataset)
        unknown = None in {estimate.train_tokens, estimate.steps, estimate.cost}
        expect(not unknown or bool(estimate.notes), "a note about what is unknown")
        expect(estimate.cost is None or estimate.price_source is not None, "a source of the cost")


def _readable(name: str) -> str:
    return name.removeprefix("check_").replace("_", " ")


def _is_ours(error: Exception) -> bool:
    return isinstance(error, AssertionError)
