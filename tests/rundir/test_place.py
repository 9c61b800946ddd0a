"""A home has one id, whoever marks it first."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from training_backends.rundir.place import find_place, make_place


def test_processes_that_mark_a_home_at_once_agree(tmp_path: Path) -> None:
    """Whichever comes first decides."""
    with ThreadPoolExecutor(8) as threads:
        places = list(threads.map(make_place, [tmp_path] * 8))
    assert len({place.id for place in places}) == 1
    assert find_place(tmp_path) == places[0]
