"""Runs the commands that start from a model: each prints what a stage of lmfx gives, or saves a network."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from lmfx.budget import Budget
from lmfx.cli.inputs import example, fed, loaded_model
from lmfx.cli.next_steps import default_output
from lmfx.cli.options import COMPRESS_OPTIONS, SPAN_OPTIONS, estimator, executor, taken
from lmfx.cli.outputs import check_folder, output_folder, save_network
from lmfx.compress import compress
from lmfx.environment.bounded_reading import in_one_line
from lmfx.latency import Backend, LatencyTable, get_backend
from lmfx.latency.carried_table import check_table
from lmfx.passes.errors import OptionError
from lmfx.passes.ir import Refusal
from lmfx.passes.spans.enumeration import SpanOptions, SpanSet, enumerate_spans
from lmfx.passes.spans.layers import Network
from lmfx.planning.frontier import IDENTITY, Frontier
from lmfx.planning.keeping import parse_keep
from lmfx.report import report
from lmfx.report.spans import candidate_rows, refusals_list, spans_table
from lmfx.report.text import calibration_text
from lmfx.report.words import table
from lmfx.simplify import simplify
from lmfx.stages import default_backend, profile, score, solve, trace
from lmfx.training.recovery_clock import seconds_of

__all__ = [
    "compress_command",
    "frontier_command",
    "profile_command",
    "simplify_command",
    "spans_command",
]

FRONTIER_ROWS = 12


def _backend(args: argparse.Namespace, graph: nn.Module) -> Backend:
    options: dict[str, Any] = {} if args.threads is None else {"threads": args.threads}
    if args.precision not in (None, "fp32"):
        options["precision"] = args.precision
    return get_backend(args.backend or default_backend(graph), **options)


def _carried(args: argparse.Namespace) -> LatencyTable | None:
    """The table of --table, if there is one. Read before the model is, because it is what may be wrong."""
    if getattr(args, "table", None) is None:
        return None
    for name in ("backend", "threads", "precision"):
        if getattr(args, name) is not None:
            raise OptionError(f"--{name} says where to measure, and with --table nothing is measured: leave one out")
    return LatencyTable.load(args.table)


def _model_and_example(args: argparse.Namespace) -> tuple[nn.Module, Any]:
    given = example(args) if args.example is not None else None  # read before the model is, because it may be wrong
    loaded = loaded_model(args)
    return loaded.model, example(args, loaded) if given is None else given


def _measured(args: argparse.Namespace, model: nn.Module, x: Any) -> tuple[Any, SpanSet, LatencyTable]:
    carried = _carried(args)
    graph = trace(model, x)
    spans = enumerate_spans(Network(graph), SpanOptions(**taken(args, SPAN_OPTIONS)))
    if carried is not None:
        check_table(spans, carried)
        return graph, spans, carried
    backend = _backend(args, graph)
    return graph, spans, profile(graph, backend, spans=spans, cache_dir=args.cache_dir, progress=not args.quiet)


def spans_command(args: argparse.Namespace) -> None:
    """`lmfx spans`: lists candidates, or refusals."""
    graph = trace(*_model_and_example(args))
    spans = enumerate_spans(Network(graph), SpanOptions(**taken(args, SPAN_OPTIONS)))
    if args.refused:
        _print_refusals(spans.refusals, args.json)
        return
    if args.json:
        _print_rows(candidate_rows(spans))
        return
    print(spans_table(spans))


def _print_refusals(refusals: Sequence[Refusal], as_json: bool) -> None:
    if as_json:
        _print_rows([{"reason": r.reason, "nodes": list(r.nodes)} for r in refusals])
        return
    print(refusals_list(refusals))


def _print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """A JSON list with one line a row."""
    print("[" + ",\n ".join(json.dumps(row) for row in rows) + "]")


def profile_command(args: argparse.Namespace) -> None:
    """`lmfx profile`: measures the candidates that may pay."""
    if args.output:
        check_folder(Path(args.output))
    _, spans, latency = _measured(args, *_model_and_example(args))
    rows = []
    for c in spans:
        if c.key in latency and c.convs:
            m = latency[c.key]
            rows.append(
                (c.key, " ".join(c.convs[:3]) + (" ..." if len(c.convs) > 3 else ""), f"{m.ms:.4f}", f"{m.spread:.4f}")
            )
    where = {name: latency.identity.get(name) for name in ("backend", "version", "device", "threads")}
    print(in_one_line("{backend} {version} on {device}, {threads} thread(s)".format(**where)) + "\n")
    print(table(("candidate", "convolutions", "ms", "spread"), rows, right=(2, 3)))
    print(f"\n{calibration_text(latency)}")
    if args.output:
        print(f"\nwrote {latency.save(args.output)}")


def frontier_command(args: argparse.Namespace) -> None:
    """`lmfx frontier`: every Pareto-optimal latency and importance, as text, JSON or a picture."""
    if args.plot:
        check_folder(Path(args.plot))
    importance = estimator(args)
    options = {"surrogate": args.surrogate} if importance == "reconstruction" else {}
    with executor(args) as workers:
        given = fed(args)
        data, what = given.images, given.what
        graph, spans, latency = _measured(args, given.loaded.model, given.example)
        scores = score(
            graph,
            importance,
            calibration=data,
            spans=spans,
            latency=latency,
            cache_dir=args.cache_dir,
            executor=workers,
            progress=not args.quiet,
            **options,
        )
    frontier = solve(graph, latency, scores, spans=spans)
    if args.json:
        points = [
            {"latency": ms, "importance": value, "candidates": [c.key for c in frontier.plan(i).candidates]}
            for i, (ms, value) in enumerate(zip(frontier.latency.tolist(), frontier.importance.tolist(), strict=True))
        ]
        print(json.dumps({"original": frontier.original, "calibration": what, "points": points}, indent=1))
    else:
        _print_frontier(frontier, what)
    if args.plot:
        try:
            frontier.plot(args.plot)
        except (OSError, ValueError) as error:
            raise OptionError(
                f"cannot draw to {args.plot}: {error}; give a name that ends in .png, .svg or .pdf"
            ) from error
        print(f"\nwrote {args.plot}", file=sys.stderr if args.json else sys.stdout)


def _print_frontier(frontier: Frontier, calibration: str) -> None:
    chosen = sorted({round(i) for i in np.linspace(0, len(frontier) - 1, min(FRONTIER_ROWS, len(frontier)))})
    rows = [
        (f"{p.latency:.4f}", f"{p.latency / frontier.original:.3f}", f"{p.importance:.4g}", str(len(p.plan.candidates)))
        for p in (frontier[i] for i in chosen)
    ]
    whole = "the original's rows add up to" if frontier.line is IDENTITY else "the original is predicted at"
    print(f"{len(frontier)} Pareto-optimal plans; {whole} {frontier.original:.4f} ms")
    print(f"importance from {calibration}\n")
    print(table(("ms", "of the original", "importance", "changed spans"), rows, right=range(4)))


def compress_command(args: argparse.Namespace) -> None:
    """`lmfx compress`: makes a network within a budget and saves it."""
    budget = None if args.budget is None else Budget.parse(args.budget)
    keep = None if args.keep is None else parse_keep(args.keep)
    if args.recover is not None:
        seconds_of(args.recover)
    output = output_folder(args.output or default_output(args.model, budget, keep))
    if args.onnx:
        from lmfx.export.builder import require_onnx

        require_onnx()  # said now and not after minutes of work
    carried = _carried(args)
    importance = estimator(args)
    with executor(args) as workers:
        given = fed(args)
        net = compress(
            given.loaded.model,
            given.example,
            budget,
            keep=keep,
            quality=args.quality,
            refit=not args.no_refit,
            precision=args.precision,
            recover=args.recover,
            input_sizes=args.input_sizes,
            calibration=given.images,
            latency=_backend(args, given.loaded.model) if carried is None else carried,
            importance=importance,
            surrogate=args.surrogate,
            executor=workers,
            cache_dir=args.cache_dir,
            merge=not args.trainable,
            progress=not args.quiet,
            **taken(args, COMPRESS_OPTIONS),
        )
    print(report(net))
    print(f"\ncalibrated on {given.what}")
    if given.loaded.random:
        print("the weights are random: latencies hold, outputs mean nothing; see --weights")
    save_network(net, output, args, given.example, random_weights=given.loaded.random)


def simplify_command(args: argparse.Namespace) -> None:
    """`lmfx simplify`: makes all merges that lose nothing and saves the result."""
    output = output_folder(args.output)
    if args.onnx:
        from lmfx.export.builder import require_onnx

        require_onnx()
    model, x = _model_and_example(args)
    net = simplify(model, x, growth=args.growth, **taken(args, ("include", "exclude")))
    print(report(net))
    save_network(net, output, args, x)
