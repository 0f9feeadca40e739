"""How the source is laid out: files and lines of each folder, and the longest chain of modules that import each other.

    PYTHONPATH=. .venv/bin/python benchmarks/promises/structure.py            this tree
    git worktree add /tmp/before REVISION
    PYTHONPATH=. .venv/bin/python benchmarks/promises/structure.py /tmp/before

A chain follows the imports at the top of modules, not those that a function makes when it is called; an `__init__.py`
is a link only where it is imported itself.
"""

from __future__ import annotations

import argparse
import ast
from collections import Counter
from pathlib import Path

FOLDERS = ("passes", "lmfx", "benchmarks", "tests")


def sources(root: Path) -> list[Path]:
    """The Python files of a tree; `lmfx/passes` is a link to `passes`."""
    found = (path.relative_to(root) for folder in FOLDERS for path in (root / folder).rglob("*.py"))
    return sorted(path for path in found if path.parts[:2] != ("lmfx", "passes"))


def imports(root: Path, path: Path, modules: dict[str, Path]) -> list[str]:
    """The modules of the tree that a file imports at its top."""
    package = name_of(path).split(".") if path.name == "__init__.py" else name_of(path).split(".")[:-1]
    found = []
    for node in ast.parse((root / path).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            inside = [f"{base}.{alias.name}" for alias in node.names]
            found += [name if name in modules else base for name in inside]
    return [name for name in dict.fromkeys(found) if name in modules and name != name_of(path)]


def name_of(path: Path) -> str:
    """The name under which a file is imported."""
    parts = (*(("lmfx",) if path.parts[0] == "passes" else ()), *path.with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def longest_chain(root: Path) -> list[str]:
    """The longest way along imports, a module at a time."""
    modules = {name_of(path): path for path in sources(root) if path.parts[0] in ("passes", "lmfx")}
    graph = {name: imports(root, path, modules) for name, path in modules.items()}
    known: dict[str, tuple[str, ...]] = {}

    def longest(name: str) -> tuple[str, ...]:
        if name not in known:
            below: list[tuple[str, ...]] = [(), *(longest(n) for n in graph[name])]
            best = max(below, key=len)
            known[name] = (name, *best)
        return known[name]

    chains = [longest(name) for name in graph]
    return list(sorted(chains, key=len)[-1])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", nargs="?", type=Path, default=Path(__file__).resolve().parents[2])
    root = parser.parse_args().root
    files, lines = Counter[str](), Counter[str]()
    for path in sources(root):
        folder = "/".join(path.parts[:-1])
        files[folder] += path.name != "__init__.py"
        lines[path.parts[0]] += len((root / path).read_text(encoding="utf-8").splitlines())
    for folder in FOLDERS:
        counts = sorted(n for name, n in files.items() if name.split("/")[0] == folder and n)
        print(f"{folder:12}{lines[folder]:7} lines, {len(counts):3} folders of {counts[0]} to {counts[-1]} files")
    chain = longest_chain(root)
    print(f"\nlongest chain of imports, {len(chain)} modules: {' > '.join(chain)}")


if __name__ == "__main__":
    main()
