"""Says what a person can do about a refusal. Reasons are texts for people, so they are known by their words."""

from __future__ import annotations

import re

__all__ = ["advice_for"]

# In this order: the first that matches. What stands in a reason between these words are names and numbers.
ADVICE: tuple[tuple[str, str], ...] = (
    (r"^excluded: ", "You asked for it: take the name out of exclude= to let lmfx try."),
    (r"^not included: ", "You asked for it: add the name to include= to let lmfx try."),
    (r"over max_kernel_size", "Raise max_kernel_size=, or leave it: the same span may be fitted with a smaller kernel."),
    (r"^the activation .* would be removed|convs are pruned, or a norm moves", "Only merges that lose nothing were "
     "asked for; lmfx.compress with a budget may remove it."),
    (r"growth=", "One conv would cost more than its parts. Raise growth= if the runtime likes fewer, larger ops."),
    (r"activation_after", "Leave activation_after= out: with it no merge is without loss."),
    (r"shared with another call|called elsewhere|called several times", "Give each call a module of its own (copy the "
     "weights), if they need not stay tied."),
    (r"read by .* that do not rejoin|the network returns|leave the layers|seen in several regions", "Something else "
     "needs this value. If it is an output or a hook that you do not use, remove it from forward."),
    (r"max_?pool|MaxPool", "A max pool stays where it is; an average pool, or a stride in the conv, would merge."),
    (r"works on a vector|vector", "There is no map any more; a linear layer after it is merged with its neighbours only."),
    (r"product of two maps|broadcasts over the map", "A gate (squeeze-excite, say) is kept, or fitted across: keep "
     '"fit" in realize=.'),
    (r"not along the channels", "Concatenate along dimension 1, and it is understood."),
    (r"no series of layers|closes no block|takes several values", "The part is fitted as a whole where its shapes "
     "allow it, and what is inside is compressed by itself."),
    (r"not narrowed|convs read the channels|groups of channels|channels go together|channels are not read|keep channels "
     r"apart|channels are", "The channels are needed elsewhere, so the width stays; the depth around it may still change."),
    (r"follows no conv's rule|size rule|output size|sizes? ", "Its output size depends on the input in another way than a "
     "convolution's. Fixed paddings instead of computed ones often help."),
    (r"enlarges the map|enlarge", "What makes maps larger merges with what comes before it only."),
    (r"only an activation", "There is nothing here to merge; nothing to do."),
    (r"training|random|data-dependent|cannot be traced|opaque|hook", "Call model.eval(), and keep branches on data out "
     "of this module; then it can be traced."),
    (r"not affine|not an affine op|Norm|affine", "It is not linear, so a merged conv cannot hold it; it is kept, or a "
     'fit replaces the whole span ("fit" in realize=).'),
    (r"pad", "Use one kind of padding in layers that should merge (zeros, best), or leave it as it is."),
    (r"stride|dilation|kernel|channels|groups|unknowns", "The sizes do not fit one convolution; other spans around it may."),
)  # fmt: skip
OTHERWISE = "It is left as it was. If it costs much of the latency, see docs/networks.md for what is understood."


def advice_for(reason: str) -> str:
    """What to do about a refusal of this reason."""
    return next((advice for words, advice in ADVICE if re.search(words, reason)), OTHERWISE)
