// What this CPU and its operating system can run, by cpuid and xgetbv (Intel SDM, volume 2A, CPUID; volume 1, 13.3).

#include "cpu.h"

#if defined(__x86_64__) || defined(_M_X64)
#define QTOOL_X86_64
#if defined(_MSC_VER)
#include <immintrin.h>
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif

namespace qtool {
namespace {

#if defined(QTOOL_X86_64)

struct Registers {
  std::uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

// All zero for a leaf that this CPU does not have.
Registers cpuid(std::uint32_t leaf, std::uint32_t subleaf) {
  Registers r;
#if defined(_MSC_VER)
  int words[4];
  __cpuid(words, 0);
  if (static_cast<std::uint32_t>(words[0]) < leaf) return r;
  __cpuidex(words, static_cast<int>(leaf), static_cast<int>(subleaf));
  r.eax = words[0], r.ebx = words[1], r.ecx = words[2], r.edx = words[3];
#else
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
#endif
  return r;
}

// XCR0: the register states that the operating system saves at a task switch. Call only where OSXSAVE is set.
std::uint64_t saved_states() {
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  std::uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<std::uint64_t>(high) << 32) | low;
#endif
}

bool bit(std::uint32_t word, int index) { return (word >> index) & 1; }

std::uint64_t detect() {
  if (!bit(cpuid(1, 0).ecx, 27)) return 0;  // OSXSAVE
  const std::uint64_t states = saved_states();
  const auto saves = [states](std::uint64_t mask) { return (states & mask) == mask; };
  const bool ymm = saves(0x6);        // XMM, YMM
  const bool zmm = saves(0xe6);       // and the opmasks, both halves of ZMM
  const bool tiles = saves(0x60000);  // tile configuration and tile data

  const Registers leaf7 = cpuid(7, 0);
  const Registers leaf7_1 = leaf7.eax >= 1 ? cpuid(7, 1) : Registers{};
  std::uint64_t found = 0;
  const auto add = [&found](bool present, Feature feature) {
    if (present) found |= feature;
  };
  add(ymm && bit(leaf7.ebx, 5), kAvx2);
  add(ymm && bit(cpuid(1, 0).ecx, 12), kFma);
  add(zmm && bit(leaf7.ebx, 16), kAvx512F);
  add(zmm && bit(leaf7.ebx, 30), kAvx512Bw);
  add(zmm && bit(leaf7.ebx, 17), kAvx512Dq);
  add(zmm && bit(leaf7.ebx, 31), kAvx512Vl);
  add(zmm && bit(leaf7.ecx, 11), kAvx512Vnni);
  add(ymm && bit(leaf7_1.eax, 4), kAvxVnni);
  add(zmm && bit(leaf7_1.eax, 5), kAvx512Bf16);
  add(tiles && bit(leaf7.edx, 25), kAmxInt8);
  add(tiles && bit(leaf7.edx, 22), kAmxBf16);
  return found;
}

#else

std::uint64_t detect() { return 0; }

#endif

}  // namespace

std::uint64_t cpu_features() {
  static const std::uint64_t found = detect();
  return found;
}

}  // namespace qtool
