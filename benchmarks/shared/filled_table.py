"""A CSV table with a row for each network, which a script fills: what has a row is not made again.

    python benchmarks/promises/SCRIPT.py [--models 'timm/*'] [--table FILE.csv]

The table is written after every row, so a script that is ended goes on where it was. A row that could not be made has
the error as its `note`.
A module, not a script.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = ["fill_table"]


def fill_table(
    description: str | None,
    table: Path,
    fields: Sequence[str],
    families: Mapping[str, str],
    row_of: Callable[[str], dict[str, Any]],
    problems: tuple[type[BaseException], ...],
    arguments: Sequence[str] | None = None,
) -> None:
    """Makes the rows that are missing; `families` has every network with its family, `problems` go into the table."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="*", metavar="GLOB")
    parser.add_argument("--table", type=Path, default=table)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    done = list(csv.DictReader(options.table.open())) if options.table.exists() else []
    known = {row["model"] for row in done}
    for name, family in families.items():
        if name in known or not fnmatch.fnmatch(name, options.models):
            continue
        try:
            row = row_of(name)
        except problems as problem:
            row = {"note": f"{type(problem).__name__}: {problem}"[:400]}
        row |= {"model": name, "family": family, "note": " ".join(str(row.get("note", "")).split())}
        done.append(row)
        print({k: row.get(k) for k in fields}, flush=True)
        with options.table.open("w", newline="") as file:
            writer = csv.DictWriter(file, fields)
            writer.writeheader()
            writer.writerows(done)
