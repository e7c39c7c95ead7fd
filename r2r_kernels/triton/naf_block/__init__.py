"""naf_block: a whole NAF block in three launches up to 64 channels, in four above (float32: four).

`fold` multiplies norms and scales into the convolutions. `forward` and `backward` run the stages. A stage has the name
of what it writes: `hidden`, `gated`, `attention`, `result`; its backward has that name and `_backward`.

    folded = fold(params, x.dtype)  # a frozen model keeps it
    y = forward(x, folded, 1e-6)  # or forward(x, params, 1e-6)
    y, mean = forward_training(x, params, 1e-6)
    dx, grads = backward(dy, x, mean, params, 1e-6)
"""

from r2r_kernels.triton.naf_block.backward import CANDIDATES as _OF_BACKWARD
from r2r_kernels.triton.naf_block.backward import backward, hidden_backward, result_backward
from r2r_kernels.triton.naf_block.fold import CANDIDATES as _OF_FOLD
from r2r_kernels.triton.naf_block.fold import FoldedParams, fold, unfold
from r2r_kernels.triton.naf_block.forward import CANDIDATES as _OF_FORWARD
from r2r_kernels.triton.naf_block.forward import (
    attend,
    forward,
    forward_training,
    make_attention,
    make_gated,
    make_hidden,
    make_result,
)

CANDIDATES = _OF_FORWARD | _OF_BACKWARD | _OF_FOLD

__all__ = [
    "CANDIDATES",
    "FoldedParams",
    "attend",
    "backward",
    "fold",
    "forward",
    "forward_training",
    "hidden_backward",
    "make_attention",
    "make_gated",
    "make_hidden",
    "make_result",
    "result_backward",
    "unfold",
]
