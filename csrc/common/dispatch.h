// The kernels of an operator: one table for each instruction set and dtype, and the choice among them.
//
// OP.h has `template <class T> struct OPKernels` with a pointer to each kernel, and R2R_DECLARE_KERNELS(OPKernels). OP-inl.h
// has the kernels and fills the table. The build compiles it once for each instruction set; R2R_ISA is the name of the set.
// The driver, OP.cpp, calls kernels<OPKernels<T>>().
#pragma once

#include <cstdint>

// Calls X(instruction set, further arguments) for each instruction set, the least capable first.
#if defined(__x86_64__)
#define R2R_INSTRUCTION_SETS(X, ...)     \
  X(baseline __VA_OPT__(, ) __VA_ARGS__) \
  X(avx2 __VA_OPT__(, ) __VA_ARGS__)     \
  X(avx512 __VA_OPT__(, ) __VA_ARGS__)   \
  X(avx512_bf16 __VA_OPT__(, ) __VA_ARGS__)
#else
#define R2R_INSTRUCTION_SETS(X, ...) X(baseline __VA_OPT__(, ) __VA_ARGS__)
#endif

namespace r2r {

struct bfloat16 {
  uint16_t bits;
};

#define R2R_ENUMERATOR(isa) isa,
enum class InstructionSet { R2R_INSTRUCTION_SETS(R2R_ENUMERATOR) };
#undef R2R_ENUMERATOR

InstructionSet instruction_set();  // the best that this processor has, or the one that ATEN_CPU_CAPABILITY names
const char* instruction_set_name();

#define R2R_DECLARE_TABLE(isa) \
  namespace isa {              \
  template <class Kernels>     \
  const Kernels& table();      \
  }
R2R_INSTRUCTION_SETS(R2R_DECLARE_TABLE)
#undef R2R_DECLARE_TABLE

template <class Kernels>
const Kernels& kernels() {
  switch (instruction_set()) {
#define R2R_CASE(isa)       \
  case InstructionSet::isa: \
    return isa::table<Kernels>();
    R2R_INSTRUCTION_SETS(R2R_CASE)
#undef R2R_CASE
  }
  __builtin_unreachable();
}

#define R2R_DECLARE_KERNELS_OF(isa, Kernels) \
  namespace isa {                            \
  template <>                                \
  const Kernels<float>& table();             \
  template <>                                \
  const Kernels<bfloat16>& table();          \
  }
#define R2R_DECLARE_KERNELS(Kernels) R2R_INSTRUCTION_SETS(R2R_DECLARE_KERNELS_OF, Kernels)

// In namespace r2r::R2R_ISA, at the end of OP-inl.h: `filled` is the variable template of the tables.
#define R2R_DEFINE_KERNELS(Kernels, filled) \
  template <>                               \
  const Kernels<float>& table() {           \
    return filled<float>;                   \
  }                                         \
  template <>                               \
  const Kernels<bfloat16>& table() {        \
    return filled<bfloat16>;                \
  }

}  // namespace r2r
