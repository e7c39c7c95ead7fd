"""The same model on the fused operators: `from r2r.fast import R2R` is the one line that changes."""

from __future__ import annotations

from r2r import model

__all__ = ["R2R"]


class R2R(model.R2R):
    """`r2r.R2R` on `r2r_kernels.functional`: same constructor, `state_dict` and answers."""

    eager = False
