// The Python module r2r_kernels._C: what the build was made with. Loading it registers the operators of the namespace
// r2r_native. Each operator's own file declares it.
#include <pybind11/pybind11.h>

#include "common/dispatch.h"
#include "unchanged.h"

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native operators of r2r_kernels; importing this registers them with PyTorch.";
  module.attr("compiler") = R2R_COMPILER;
  module.attr("flags") = R2R_FLAGS;
  module.attr("torch") = R2R_TORCH;
  module.attr("cuda_architectures") = R2R_CUDA_ARCHITECTURES;
  if (!r2r::add_unchanged(module.ptr())) throw pybind11::error_already_set();
  module.attr("instruction_set") = r2r::instruction_set_name();
}
