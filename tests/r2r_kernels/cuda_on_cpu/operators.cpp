// The CUDA operators in place of those for CPUs.
#include "cuda.cuh"

#define CUDA CPU
#include "gated_conv.cu"
