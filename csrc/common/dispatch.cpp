#include "dispatch.h"

#include <cstdlib>
#include <string>

namespace r2r {

namespace {

// As PyTorch's own kernels, these obey ATEN_CPU_CAPABILITY=default|avx2|avx512 (the last: without bf16 instructions).
InstructionSet choose() {
#if defined(__x86_64__)
  const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string wanted = variable ? variable : "";
  if (wanted == "default") return InstructionSet::baseline;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && wanted != "avx2") {
    const bool bf16 = __builtin_cpu_supports("avx512bf16") && wanted != "avx512";
    return bf16 ? InstructionSet::avx512_bf16 : InstructionSet::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return InstructionSet::avx2;
#endif
  return InstructionSet::baseline;
}

}  // namespace

InstructionSet instruction_set() {
  static const InstructionSet chosen = choose();
  return chosen;
}

const char* instruction_set_name() {
  switch (instruction_set()) {
#define R2R_NAME(isa)       \
  case InstructionSet::isa: \
    return #isa;
    R2R_INSTRUCTION_SETS(R2R_NAME)
#undef R2R_NAME
  }
  __builtin_unreachable();
}

}  // namespace r2r
