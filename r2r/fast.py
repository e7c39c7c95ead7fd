"""The same model on the fused operators: `from r2r.fast import R2R` is the one line that changes."""

from __future__ import annotations

import torch

from r2r import model
from r2r.frozen import FrozenR2R

__all__ = ["R2R", "FrozenR2R"]


class R2R(model.R2R):
    """`r2r.R2R` on `r2r_kernels.functional`: same constructor, `state_dict` and answers."""

    eager = False

    def freeze(self, dtype: torch.dtype | None = None) -> FrozenR2R:
        """The inference form, a copy that computes in `dtype` on the device the model is on; see `FrozenR2R`.

        dtype: float32, bfloat16 or float16; None is bfloat16 on a GPU and float32 elsewhere. Raises ValueError for
        other dtypes, InputError where the bank is empty.
        """
        return FrozenR2R(self, dtype)
