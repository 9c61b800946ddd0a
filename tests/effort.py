"""How far tests search: `pytest --hypothesis-profile thorough` searches longer."""

import hypothesis

__all__ = ["is_thorough"]


def is_thorough() -> bool:
    """Tell whether the tests may take long."""
    return hypothesis.settings.get_current_profile_name() == "thorough"
