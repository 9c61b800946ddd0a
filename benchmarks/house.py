"""Print the size and shape of the source tree, for comparing two states of it.

    python benchmarks/house.py [ROOT …]

Reads the package under each ROOT (default: this repository), for example worktrees of two commits,
and imports nothing of it.
"""

import ast
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median

PACKAGE = "training_backends"
_SHORT = 130
"""Lines up to which a module with one importer could be part of it."""


def main(roots: list[Path]) -> None:
    """Print a table with one column per root."""
    columns = [dict(figures(root / PACKAGE)) for root in roots]
    names = list(dict.fromkeys(name for column in columns for name in column))
    width = max(map(len, names))
    for name in names:
        print(f"{name:{width}}", *(f"{column.get(name, '-'):>28}" for column in columns))


def figures(package: Path) -> Iterator[tuple[str, str]]:
    """Yield the name and the value of each figure."""
    sources = {path: path.read_text(encoding="utf-8") for path in sorted(package.rglob("*.py"))}
    trees = {path: ast.parse(source) for path, source in sources.items()}
    lines = {path: len(source.splitlines()) for path, source in sources.items()}
    yield "files", f"{len(lines):,}"
    yield "lines", f"{sum(lines.values()):,}"
    yield "lines of a file, median", f"{median(lines.values()):.0f}"
    largest = max(lines, key=lines.__getitem__)
    yield "largest file", f"{lines[largest]} {largest.relative_to(package)}"
    functions = sorted(_functions(trees.values()))
    yield "functions", f"{len(functions):,}"
    yield "lines of a function, median", f"{median(functions):.0f}"
    yield "lines of a function, p90", f"{functions[len(functions) * 9 // 10]}"
    importers = _importers(package, trees)
    alone = [path for path, of in importers.items() if len(of) == 1 and lines[path] <= _SHORT]
    yield f"modules up to {_SHORT} lines with one importer", f"{len(alone)}"
    classes = Counter(
        node.name
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    twice = sorted(name for name, count in classes.items() if count > 1)
    yield "class names with several meanings", f"{len(twice)}"
    for folder in sorted({_folder(package, path) for path in lines}):
        inside = [lines[path] for path in lines if _folder(package, path) == folder]
        yield f"  {folder}", f"{len(inside)} files, {sum(inside):,} lines"


def _functions(trees: Iterable[ast.Module]) -> Iterator[int]:
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield (node.end_lineno or node.lineno) - node.lineno + 1


def _folder(package: Path, path: Path) -> str:
    parts = path.relative_to(package).parts[:-1]
    return "/".join(parts[: 2 if parts[:1] == ("backends",) else 1]) or "."


def _importers(package: Path, trees: dict[Path, ast.Module]) -> dict[Path, set[Path]]:
    """Return for each module, except `__init__` and `__main__`, the modules that import it."""
    modules = {
        ".".join(path.relative_to(package.parent).with_suffix("").parts): path for path in trees
    }
    found: dict[Path, set[Path]] = defaultdict(set)
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            for name in names:
                if name in modules and modules[name] != path:
                    found[modules[name]].add(path)
    return {path: of for path, of in found.items() if not path.name.startswith("__")}


if __name__ == "__main__":
    main([Path(each) for each in sys.argv[1:]] or [Path(__file__).parent.parent])
