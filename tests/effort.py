"""How far tests search: `pytest --hypothesis-profile thorough` searches longer."""

import hypothesis

__all__ = ["is_thorough", "searching"]


def is_thorough() -> bool:
    """Tell whether the tests may take long."""
    return hypothesis.settings.get_current_profile_name() == "thorough"


def searching(share: int, parent: hypothesis.settings | None = None) -> hypothesis.settings:
    """Try one in `share` of the profile's examples, for a test that is repeated for many cases."""
    examples = hypothesis.settings().max_examples // share
    return hypothesis.settings(parent, max_examples=examples)
