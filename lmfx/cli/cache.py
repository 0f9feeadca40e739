"""`lmfx cache`: lists what the store holds, carries it to other machines, and prunes it.

lmfx cache list                            kinds and identities: rows, size, age
lmfx cache export FILE.json                rows as JSON
lmfx cache import FILE.json                those of them that are not there yet
lmfx cache prune --older-than 90           rows that are not needed any more
lmfx cache path                            where the store is
lmfx cache check                           whether it is whole
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmfx.latency import Store, default_cache_dir
from lmfx.passes.errors import OptionError, StoreError
from lmfx.report.words import table
from lmfx.store.rows import FOLDER_NAME
from lmfx.store.transfer import Listed, Selection, entries, export_rows, import_rows, prune

__all__ = ["cache_commands"]

NAMED = ("backend", "estimator", "version", "device", "threads")  # columns of their own
UNITS = {"h": 1 / 24, "d": 1.0, "w": 7.0, "y": 365.0, "": 1.0}


def cache_commands(parser: argparse.ArgumentParser) -> None:
    """Adds `list`, `export`, `import`, `prune`, `path` and `check` to the parser of `lmfx cache`."""
    commands = parser.add_subparsers(dest="cache_command", required=True, metavar="WHAT")

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        made.add_argument(
            "--cache-dir", metavar="DIR", help="where the store is (default: $LMFX_CACHE_DIR, or ~/.cache)"
        )
        made.set_defaults(run=run)
        return made

    made = command("list", _list, "list what the store holds")
    _selection_options(made)
    made.add_argument("--json", action="store_true", help="print a JSON object with whole identities")

    made = command("export", _export, "write rows of the store as JSON")
    made.add_argument("file", metavar="FILE.json")
    _selection_options(made)

    made = command("import", _import, "add the rows of an exported file that are not in the store")
    made.add_argument("file", metavar="FILE.json")

    made = command("prune", _prune, "delete rows of the store, and give their space back")
    _selection_options(made)
    made.add_argument("--older-than", type=_days, metavar="AGE", help="12h, 30d (or 30), 8w, 1y")
    made.add_argument("--all", action="store_true", help="every row")
    made.add_argument("--dry-run", action="store_true", help="only say how many")

    command("path", _path, "print where the store is")
    command("check", _check, "read every row and its checksum")


def _selection_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", metavar="NAME", help="only rows of this backend (or estimator)")
    parser.add_argument("--version", metavar="V", help="only rows of this version of it")
    parser.add_argument("--device", metavar="TEXT", help="only rows of devices with this in their name")
    parser.add_argument("--kind", choices=("latency", "importance"), help="only rows of this kind")


def _days(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([hdwy]?)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no age; write 12h, 30d, 8w or 1y")
    return float(found[1]) * UNITS[found[2]]


def _selection(args: argparse.Namespace) -> Selection:
    names = [f.name for f in dataclasses.fields(Selection)]
    return Selection(**{name: getattr(args, name, None) for name in names})


def _place(args: argparse.Namespace) -> Path:
    return (Path(args.cache_dir) if args.cache_dir else default_cache_dir()) / FOLDER_NAME


def _there(args: argparse.Namespace) -> Store:
    """The store, which is not made by looking for it."""
    path = _place(args)
    if not path.exists():
        raise StoreError(f"there is no store at {path} yet; lmfx profile makes one, --cache-dir names another place")
    return Store(path)


def _list(args: argparse.Namespace) -> None:
    with _there(args) as store:
        found = entries(store, _selection(args))
        size = sum(path.stat().st_size for path in store.files())
    if args.json:
        listed = [{**dataclasses.asdict(e), "oldest": _iso(e.oldest), "newest": _iso(e.newest)} for e in found]
        print(json.dumps({"path": str(store.path), "bytes": size, "entries": listed}, indent=1))
        return
    print(f"{store.path}: {sum(e.rows for e in found)} rows, {_bytes(size)}\n")
    now = time.time()
    header = ("kind", "made by", "device", "threads", "rows", "size", "newest", "further")
    print(table(header, [_line(e, now) for e in found], right=(3, 4, 5)))


def _line(entry: Listed, now: float) -> tuple[str, ...]:
    i = entry.identity
    name = i.get("backend", i.get("estimator", entry.hash))
    version = f" {i['version']}" if "version" in i else ""
    further = ", ".join(f"{k} {_short(v)}" for k, v in sorted(i.items()) if k not in NAMED)
    numbers = (str(i.get("threads", "")), str(entry.rows), _bytes(entry.bytes))
    return (entry.kind, f"{name}{version}", str(i.get("device", "")), *numbers, _age(now - entry.newest), further)


def _export(args: argparse.Namespace) -> None:
    with _there(args) as store:
        rows = export_rows(store, args.file, _selection(args))
    print(f"wrote {args.file}: {rows} rows")


def _import(args: argparse.Namespace) -> None:
    with Store(_place(args)) as store:
        done = import_rows(store, args.file)
    print(f"{store.path}: {done.new} new rows of {done.new + done.known} in {args.file}")
    if done.different:
        print(f"{done.different} of the others have another value here, which stays")


def _prune(args: argparse.Namespace) -> None:
    selection = _selection(args)
    if selection == Selection() and not args.all:
        raise OptionError("say what to delete: --older-than, --backend, --version, --device, --kind, or --all")
    with _there(args) as store:
        rows, freed = prune(store, selection, args.dry_run)
    verb = "would be deleted" if args.dry_run else f"deleted, {_bytes(freed)} given back"
    print(f"{store.path}: {rows} rows {verb}")


def _path(args: argparse.Namespace) -> None:
    print(_place(args))


def _check(args: argparse.Namespace) -> None:
    with _there(args) as store:
        print(f"{store.path}: {len(store.rows())} rows, all whole")


def _bytes(number: float) -> str:
    for unit in ("B", "KB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB"


def _age(seconds: float) -> str:
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return "just now"


def _iso(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:21] + "..."
