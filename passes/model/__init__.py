"""The model before it is traced: what it takes and gives, a copy to work on, and how it behaves when it is run.

In: an `nn.Module` and an example. Out: its inputs and outputs by name (`interface`), a copy in eval mode with plain
weights (`model_copy`, `computed_weights`), whether it changes while it is run or draws random numbers (`stateful`,
`random_ops`), and at which sizes a graph of it is right (`other_sizes`, which tries the `size_changes` and compares by
`differences`; `size_limits` refuses the others). `quiet`, `autocast` and `randomness` are the ways to run it without
noise, in full precision and without touching the caller's random numbers.
"""

from .interface import Example, bind, plain_output
from .model_copy import eval_copy

__all__ = ["Example", "bind", "eval_copy", "plain_output"]
