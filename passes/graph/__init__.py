"""What a traced graph is made of, and how it is read, edited and checked.

In: nodes and modules of a `torch.fx.GraphModule`. Out: what an op is (`ops`), what a conv, a pool or a pad is as one
convolution in integers (`conv_configs`), which value is a feature map and how its size follows the input's
(`map_shapes`), the network as nested series and parallels (`reduction`), and graphs that are edited (`graph_edit`) and
checked (`verify`) without a trace of how. Words: a *map* is a value (batch, channels, size...); a *join* is an op
with several maps as operands; a *mesh* is a part with one entry and one exit that is no series.
"""

from .tensor_inputs import bare
from .verify import relative_error

__all__ = ["bare", "relative_error"]
