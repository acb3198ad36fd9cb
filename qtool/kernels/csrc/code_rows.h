// Rows of whole attention weights as codes (docs/math.md, 9.1): what attention in integers and attention on int8 products
// have in common. Rows have a multiple of kTile numbers.

#pragma once

#include <cstddef>
#include <cstdint>

#include "isa_portable.h"
#include "schedule.h"

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

// The codebook of a head, as rows of weights are looked up in it: few edges are tried one by one, many are searched.
template <class Isa>
class Ladder {
 public:
  static constexpr int kMostEdges = 255, kFew = 15;  // comparisons that are faster than a search

  explicit Ladder(Cutter& cutter) : limits_(cutter.take<std::int32_t>(kRoom)), rises_(cutter.take<std::int32_t>(kRoom)) {}

  // Takes levels, count + 1 of them.
  void serve(const std::int32_t* levels, int count) {
    levels_ = levels, count_ = count;
    for (int e = 0; few() && e < count; ++e) {
      Isa::put(rises_ + e * Isa::kLanes, Isa::set(levels[e + 1] - levels[e] + (1 << kCodePlace)));
    }
  }

  void limit(const std::int32_t* edges, std::int64_t whole) {
    if (few()) {
      for (int e = 0; e < count_; ++e) Isa::put(limits_ + e * Isa::kLanes, Isa::set(least_weight(edges[e], whole)));
      return;
    }
    for (int e = 0; e < kMostEdges; ++e) limits_[e] = e < count_ ? least_weight(edges[e], whole) : INT32_MAX;
  }

  // Calls `done(i, level, code)` along a row of `count` weights, a multiple of kTile; `weigh(i)` gives those from i on.
  // Returns the sum of the levels.
  template <class Weigh, class Done>
  std::int64_t row(const Weigh& weigh, int count, const Done& done) const {
    if (count_ == 3) return row(weigh, count, [this](auto x) { return climb<3>(x); }, done);
    if (count_ == 7) return row(weigh, count, [this](auto x) { return climb<7>(x); }, done);
    if (count_ == 15) return row(weigh, count, [this](auto x) { return climb<15>(x); }, done);
    return row(weigh, count, [this](auto x) { return search(x); }, done);
  }

 private:
  using Int = typename Isa::Int;
  static constexpr int kRoom = 256;
  static constexpr int kCodePlace = 16;  // codes are counted above levels, which have 14 bits
  static_assert(kFew * Isa::kLanes <= kRoom, "a vector for each edge");

  bool few() const { return count_ == 3 || count_ == 7 || count_ == 15; }

  template <class Weigh, class Find, class Done>
  static std::int64_t row(const Weigh& weigh, int count, const Find& find, const Done& done) {
    auto wide = Isa::zero_wide();
    for (int i = 0; i < count; i += Isa::kLanes) {
      const Int both = find(weigh(i)), level = Isa::mask(both, Isa::set((1 << kCodePlace) - 1));
      wide = Isa::add_wide(wide, level);
      done(i, level, Isa::shift_right(both, kCodePlace));
    }
    return Isa::reduce_wide(wide);
  }

  template <int E>
  Int climb(Int weight) const {
    Int both = Isa::set(0);
#pragma GCC unroll 15
    for (int e = 0; e < E; ++e) {
      both = Isa::add(both, Isa::at_least(weight, Isa::load(limits_ + e * Isa::kLanes), Isa::load(rises_ + e * Isa::kLanes)));
    }
    return both;
  }

  Int search(Int weight) const {
    Int code = Isa::set(0);
    for (int step = (kMostEdges + 1) / 2; step > 0; step /= 2) {
      if (step > count_) continue;
      const Int limit = Isa::look_up(limits_, Isa::add(code, Isa::set(step - 1)));
      code = Isa::add(code, Isa::at_least(weight, limit, Isa::set(step)));
    }
    return Isa::add(Isa::look_up(levels_, code), Isa::shift_left(code, kCodePlace));
  }

  const std::int32_t* levels_ = nullptr;
  int count_ = 0;
  std::int32_t *limits_, *rises_;
};

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
