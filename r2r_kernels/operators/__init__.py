"""The operators that register themselves, one file each; the others are in `r2r_kernels.library`."""
