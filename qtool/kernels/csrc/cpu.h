#pragma once

#include <cstdint>

namespace qtool {

// The order of FEATURES in native.py.
enum Feature : std::uint64_t {
  kAvx2 = 1u << 0,
  kAvx512F = 1u << 1,
  kAvx512Bw = 1u << 2,
  kAvx512Vnni = 1u << 3,
  kAvxVnni = 1u << 4,
  kAmxInt8 = 1u << 5,
  kAmxBf16 = 1u << 6,
  kAvx512Bf16 = 1u << 7,
  kAvx512Dq = 1u << 8,
  kAvx512Vl = 1u << 9,
  kFma = 1u << 10,
};

// Bits of Feature that both the CPU and the operating system support. A bit of AMX says that tiles can be had; a Linux
// process must still ask for them (ARCH_REQ_XCOMP_PERM).
std::uint64_t cpu_features();

}  // namespace qtool
