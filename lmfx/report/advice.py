"""Says what a person can do about a refusal. Reasons are texts for people, so they are known by their words."""

from __future__ import annotations

import re

__all__ = ["ADVICE", "OTHERWISE", "advice_for"]

# (words of the reason, what to do), the first that matches. What else stands in a reason are names and numbers.
ADVICE: tuple[tuple[str, str], ...] = (
    ("^excluded: ", "You asked for it: take the name out of exclude= to let lmfx try."),
    ("^not included: ", "You asked for it: add the name to include= to let lmfx try."),
    ("max_kernel_size", "Raise max_kernel_size=, or leave it so: the span may be fitted with a smaller kernel."),
    ("max_fit_unknowns", "Raise max_fit_unknowns= and give more images, or leave the width as it is."),
    ("growth=", "One conv would cost more than its parts: raise growth= if your runtime likes fewer, larger ops."),
    ("activation_after", "Leave activation_after= out: with it no merge is without loss."),
    (
        "would be removed|convs are pruned, or a norm moves|pads what is not its input",
        "Only merges that lose nothing were asked for: lmfx.compress with a budget may do it.",
    ),
    (
        "shared with another call|called elsewhere|several regions",
        "Give each call a module of its own (a copy of the weights) if they need not stay tied.",
    ),
    (
        "do not rejoin|the network returns|leave the layers",
        "Something else needs this value: if it is an output or a feature that you do not use, take it out of forward.",
    ),
    (
        "convs read the channels|not narrowed|channels go together|groups of channels|channels are not read"
        "|channels apart|joins the channels",
        "The channels are needed elsewhere, so the width stays. The depth around it may still change.",
    ),
    ("product of two maps|broadcasts|side input", 'A gate is kept, or fitted across: keep "fit" in realize=.'),
    ("not along the channels", "Concatenate along dimension 1 and it is understood."),
    (
        "no series of layers|closes no block|takes several values|leave different values",
        "It is fitted as a whole where its shapes allow, and what is inside of it is compressed by itself.",
    ),
    (
        "follows no conv's rule|asked for an output size|rounds its output size",
        "Its output size follows the input's in another way than a convolution's: fixed paddings and sizes help.",
    ),
    ("enlarges the map|side is added beside", "What makes a map larger merges with what comes before it only."),
    ("only an activation", "There is no convolution here: nothing to do."),
    ("forward hooks", "Remove the hooks before compressing: they would see other values, or none."),
    ("running statistics", "Train with track_running_stats=True, or replace the norm by one that keeps them."),
    ("count its padding", "Use count_include_pad=True in the pool, and it is affine."),
    ("on an unbatched value", "Call the network with a batch dimension."),
    ("on a vector", "There is no map any more here: only linear layers that follow each other could merge."),
    (
        "is not affine|not an affine op",
        'It is not linear, so no merged conv can hold it: it is kept, or a fit replaces the whole span ("fit" in '
        "realize=). An average pool, or a stride, would merge where a max pool does not.",
    ),
    ("pad|crop", "Use one kind of padding (zeros, best) in layers that should merge."),
    ("stride|dilation|kernel|channels|size", "The sizes fit no single convolution: other spans around it may merge."),
)
OTHERWISE = "It stays as it is. If much of the time goes there, docs/networks.md says what is understood, and how."


def advice_for(reason: str) -> str:
    """What to do about a refusal of this reason."""
    return next((advice for words, advice in ADVICE if re.search(words, reason)), OTHERWISE)
