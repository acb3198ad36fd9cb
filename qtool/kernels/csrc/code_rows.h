// Rows of whole attention weights as codes (docs/math.md, 9.1): what attention in integers and attention on int8 products
// have in common. Rows have a multiple of kTile numbers.

#pragma once

#include <cstddef>
#include <cstdint>

#include "isa_portable.h"

namespace qtool {
namespace {  // compiled for each instruction set apart: no copy may serve another

constexpr int kEdgeBits = 24;  // fixed-point places of a codebook's edges

// What is written of a row of `count` numbers: 7 bits of each to each of `digits` rows, lowest first, `stride` bytes apart.
struct Digits {
  std::uint8_t* out;
  std::ptrdiff_t stride;
  int digits;

  template <class Isa>
  void put(int i, typename Isa::Int x) const {
    for (int d = 0; d < digits; ++d) Isa::put(out + d * stride + i, Isa::mask(Isa::shift_right(x, 7 * d), Isa::set(127)));
  }
};

// The least weight that reaches an edge of a share of `whole` (9.1).
inline std::int32_t least_weight(std::int32_t edge, std::int64_t whole) {
  const std::int64_t least = (edge * whole + ((std::int64_t{1} << kEdgeBits) - 1)) >> kEdgeBits;
  return static_cast<std::int32_t>(least < 1 ? 1 : least > INT32_MAX ? INT32_MAX : least);
}

// What reaching each edge adds to the level, of levels [count + 1].
inline void level_steps(const std::int32_t* levels, int count, std::int32_t* steps) {
  for (int e = 0; e < count; ++e) steps[e] = levels[e + 1] - levels[e];
}

// Calls `done(i, x)` with the sum of the steps of all edges that a weight reaches; edge e is reached from `limits[e]` on.
template <class Isa, class Done>
void code_row(const std::int32_t* weights, int count, const std::int32_t* limits, const std::int32_t* steps, int edges,
              const Done& done) {
  for (int i = 0; i < count; i += Isa::kLanes) {
    const auto weight = Isa::load(weights + i);
    auto sum = Isa::set(0);
    for (int e = 0; e < edges; ++e) sum = Isa::add(sum, Isa::at_least(weight, Isa::set(limits[e]), Isa::set(steps[e])));
    done(i, sum);
  }
}

// The same of the steps of levels, as digits. Returns the sum of the row's levels.
template <class Isa>
std::int64_t level_row(const std::int32_t* weights, int count, const std::int32_t* limits, const std::int32_t* steps, int edges,
                       const Digits& out) {
  auto wide = Isa::zero_wide();
  code_row<Isa>(weights, count, limits, steps, edges, [&](int i, auto level) {
    wide = Isa::add_wide(wide, level);
    out.template put<Isa>(i, level);
  });
  return Isa::reduce_wide(wide);
}

template <class Isa>
std::int64_t sum_row(const std::int32_t* weights, int count) {
  auto wide = Isa::zero_wide();
  for (int i = 0; i < count; i += Isa::kLanes) wide = Isa::add_wide(wide, Isa::load(weights + i));
  return Isa::reduce_wide(wide);
}

// Weights below `limit` made 0, in place. Returns the sum of the others.
template <class Isa>
std::int64_t prune_row(std::int32_t* weights, int count, std::int32_t limit) {
  auto wide = Isa::zero_wide();
  for (int i = 0; i < count; i += Isa::kLanes) {
    const auto weight = Isa::load(weights + i), kept = Isa::at_least(weight, Isa::set(limit), weight);
    Isa::put(weights + i, kept);
    wide = Isa::add_wide(wide, kept);
  }
  return Isa::reduce_wide(wide);
}

}  // namespace
}  // namespace qtool
