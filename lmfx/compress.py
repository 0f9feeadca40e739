"""`compress`: checks what is asked for, has it done (`lmfx.planning.compression`), and says what is left."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import fx

from lmfx.budget import Budget
from lmfx.calibration.model_checks import check_run_options, span_options
from lmfx.environment.caller_state import entry
from lmfx.importance import Estimator, ImportanceTable, get_estimator
from lmfx.importance.pool import ExecutorLike
from lmfx.latency import Backend, LatencyTable
from lmfx.latency.chosen_backend import PRECISIONS, chosen_backend
from lmfx.passes.errors import BudgetError, OptionError, QualityError
from lmfx.passes.ir import Realization, Surrogate
from lmfx.passes.spans.enumeration import Method, Norm
from lmfx.passes.trace.programs import Model, as_module
from lmfx.planning.compression import Compression
from lmfx.planning.input_sizes import SizeSearch, parse_sizes
from lmfx.planning.keeping import parse_keep
from lmfx.planning.several_shapes import OverShapes, shapes_of, with_shape_times
from lmfx.quality import QualityName, QualityWarning
from lmfx.quality.measures import NAMES
from lmfx.result import result_of
from lmfx.stages import default_backend
from lmfx.training.recovery_clock import seconds_of

__all__ = ["compress"]


@entry
def compress(
    model: Model,
    example_input: Any,
    budget: Budget | float | str | None = None,
    *,
    keep: float | str | None = None,
    calibration: Any = None,
    latency: str | Backend | LatencyTable | None = None,
    importance: str | Estimator | ImportanceTable = "reconstruction",
    realize: tuple[Realization, ...] = ("compose", "fit", "narrow", "factor"),
    max_kernel_size: int | None = 7,
    max_span_convs: int | None = 12,
    surrogate: Surrogate = "affine",
    method: Method = "layermerge",
    norm: Norm = "affine",
    activation_after: str | None = None,
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
    executor: ExecutorLike = None,
    cache_dir: str | os.PathLike[str] | None = None,
    merge: bool = True,
    quality: QualityName | None = "auto",
    refit: bool = True,
    recover: float | str | None = None,
    precision: str | None = None,
    input_sizes: Sequence[int | Sequence[int]] | Literal["auto"] = (),
    weights: Sequence[float] | None = None,
    progress: bool = True,
) -> fx.GraphModule:
    """`model` with fewer, merged convolutions, whose *measured* latency is within `budget`. `model` is not changed.

    Args:
        model: any network that torch.fx or torch.export can trace, in eval mode, or its `torch.export.ExportedProgram`.
        example_input: a tensor, a tuple of positional or a dict of keyword arguments, with the batch size to optimise;
            or a list of those, of several shapes, where the forward does not take the list's entries as its arguments.
        budget: 0.6 or "60%" of the original's latency, "2x" as fast, or "4.5ms". A plan that loses nothing is taken
            wherever it is within the budget; 1.0 does that at most.
        keep: the share of what the original does that must be left, 0.98 or "98%" (agreement of the arg-max, or 1 -
            divergence where nothing is a score). In place of a budget: the fastest network that keeps it. With one: a
            network that keeps less is an error.
        calibration: unlabelled images, a tensor (images, ...) or a loader of batches; without it the example stands in.
        latency: backend to measure on, "onnxruntime" (default on a CPU), "torch" (default on a GPU), "tensorrt",
            "roofline", or a backend object; or a `LatencyTable` of `lmfx.profile` that was measured elsewhere: then
            nothing is measured here, and the budget is met by prediction.
        importance: "reconstruction", "magnitude", an estimator object like `Finetune(train, evaluate)`, or a table that
            `lmfx.score` or `lmfx.score_on_demand` gave for this network.
        realize: which realizations may be used: "compose" (tensor algebra), "fit" (closed-form least squares),
            "narrow" (fewer channels inside a span, what reads them refitted), "factor" (a dense conv as a
            pointwise one after a depthwise one or one of fewer channels).
        max_kernel_size: of merged convs; None for no bound. A fit in place of one larger conv may be nearly as large.
        max_span_convs: how many convs of the main path one merged conv may replace; None for no bound.
        surrogate: what a composed span has for the activations it removes: "affine" or "identity" (the paper).
        method: what may be done to a span: "layermerge" (all), "depth" (activations are removed, all convs are merged:
            Kim et al. 2023), "layeronly" (single convs are removed, nothing is merged), "exact" (what loses nothing).
        norm: what becomes of a norm inside a composed span whose statistics come from the map, like GroupNorm: "affine"
            (its average on the calibration images) or "post" (it moves to after the merged conv, as the paper has it).
        activation_after: an activation, like "relu6", after merged convs whose span ended without one.
        include, exclude: globs of module names that may, or may not, be touched; the name of a container covers what
            is in it, and a glob that covers nothing is an error.
        executor: runs the fits of different spans, or the rows of `Finetune`, side by side (or a function that makes
            an executor).
        cache_dir: where measurements are kept (default: the user's cache); a second budget reuses them.
        merge: False gives the trainable form; `lmfx.merge` makes the deploy form of it.
        quality: what plans are chosen by, on calibration images that no fit saw: "auto" (KL of scores, divergence of
            other outputs), "kl", "agreement" (of the arg-max), "psnr" (of maps) or "divergence"; None takes the plan
            of best importance, and judges none. Plans are judged with importance="reconstruction", from 16 images on.
        refit: set the layers that the plan keeps anew, in closed form, where judged images say that it helps; needs
            what `quality` needs.
        recover: minutes, or a text like "3min" or "90s", of label-free training on the calibration images
            (`lmfx.recover`); what judges the result is not trained on.
        precision: "fp32", "fp16", "bf16" or "int8": in which the backend runs networks; rows and budget are theirs.
            In 8 bits the reported quality is that of the Q/DQ file, which `lmfx.export_onnx` writes; layers stay float
            where that is faster, and the whole network where nothing is gained (`Result.int8` says so). None takes what
            the backend has, "fp32" by default.
        input_sizes: other sizes that the images may be scaled to, heights or (height, width), or "auto" for those that
            suit the network: it is compressed for those that may be best, and the one of best quality against the
            original at its own size is returned. `Result.input_size` says which, `Result.alternatives` what the others
            keep, and what a smaller input alone would.
        weights: of the shapes of an `example_input` that is a list (each 1): latency is the weighted sum of those at
            each shape, in rows, search and budget; `Result.shapes` has each. Quality is that on the images.
        progress: show progress bars on stderr.

    Returns an ordinary GraphModule in eval mode; `lmfx.report` tells what was done. Raises subclasses of `LmfxError`,
    `InfeasibleBudget` (with the fastest latency reached) if no plan is fast enough.
    """
    model = as_module(model)
    share = None if keep is None else parse_keep(keep)
    if budget is None and share is None:
        raise BudgetError(
            "budget=None and keep=None: say how fast the network must be or what it must keep, keep=0.98. Write 0.6 or "
            '"60%" (of the original), "4.5ms", or "2x" (faster)'
        )
    wanted = None if budget is None else Budget.parse(budget)
    if surrogate not in ("affine", "identity"):
        raise OptionError(f"surrogate={surrogate!r}: use 'affine' or 'identity'")
    if quality is not None and quality not in NAMES:
        raise OptionError(f"quality={quality!r}: use one of {', '.join(map(repr, NAMES))}, or None")
    if recover is not None:
        seconds_of(recover)  # said before anything is traced
    options: dict[str, Any] = {
        "realize": realize,
        "max_kernel_size": max_kernel_size,
        "max_span_convs": max_span_convs,
        "max_fit_convs": max_span_convs,
        "method": method,
        "norm": norm,
        "activation_after": activation_after,
        "include": include,
        "exclude": exclude,
    }
    if precision is not None and precision not in PRECISIONS:
        raise OptionError(f"precision={precision!r}: use one of {', '.join(map(repr, PRECISIONS))}")
    if precision == "int8" and not merge:
        raise OptionError("precision='int8' is for the form to deploy: leave merge=False out, or train in float first")
    span_options(**options)  # said before anything is traced
    check_run_options(executor, cache_dir)
    estimator = get_estimator(importance, **({"surrogate": surrogate} if importance == "reconstruction" else {}))

    asked = Compression(
        estimator=estimator,
        options=options,
        latency=latency,
        surrogate=surrogate,
        executor=executor,
        cache_dir=cache_dir,
        merge=merge,
        quality=quality,
        refit=refit,
        recover=recover,
        progress=progress,
        precision=precision,
    )
    several = shapes_of(model, example_input, weights)
    if several is not None:
        if input_sizes or isinstance(latency, LatencyTable) or precision == "int8":
            raise OptionError("several shapes need a backend to measure on, in float, and no input_sizes=")
        example_input = several[0][0]
        inner = chosen_backend(latency, default_backend(model), precision)
        assert not isinstance(inner, LatencyTable)
        over = OverShapes(inner, model, *several, options)
        asked = replace(asked, latency=over, precision=None)
        net = with_shape_times(asked.run(model, example_input, wanted, share, calibration), over)
    elif sizes := parse_sizes(input_sizes):
        if wanted is None or quality is None or isinstance(latency, LatencyTable):
            raise OptionError("input_sizes= needs a budget, a quality and a backend to measure on")
        net = SizeSearch(asked, model, example_input, wanted, sizes, calibration, quality).best()
    else:
        net = asked.run(model, example_input, wanted, share, calibration)
    _check_quality(net, share, wanted)
    return net


def _check_quality(net: fx.GraphModule, share: float | None, budget: Budget | None) -> None:
    """Warns of a network that has collapsed. Raises `QualityError` for one that keeps less than was asked for."""
    quality = result_of(net).quality
    if quality is None:
        return
    if share is not None and budget is not None and quality.kept < share:
        raise QualityError(
            f"within the budget {budget} the best network keeps {quality.kept:.1%} of what the original does, and "
            f"keep={share:g} was asked for ({quality}, on {quality.images} images): allow a larger budget, keep less, "
            "or leave budget= out for the fastest network that keeps so much"
        )
    if quality.collapsed:
        warnings.warn(
            f"the compressed network no longer does what the original did ({quality}, on {quality.images} images): "
            "allow a larger budget, train it (recover=, lmfx.recover, lmfx.distill), or keep layers with exclude=",
            QualityWarning,
            stacklevel=4,  # the caller of compress
        )
