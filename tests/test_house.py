"""Rules that hold for the code of the whole package."""

import ast
from collections import Counter
from pathlib import Path

import training_backends


def test_class_names_are_unique() -> None:
    """A class name, in a traceback or a search, means one thing."""
    package = Path(training_backends.__file__).parent
    names = Counter(
        node.name
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_bytes()))
        if isinstance(node, ast.ClassDef)
    )
    assert [name for name, count in names.items() if count > 1] == []
