// Integer operations on one row at a time. Equations are those of docs/math.md; reference.py is the specification.

#pragma once

#include <cstdint>

#include "code_rows.h"
#include "integer.h"
#include "isa_portable.h"
#include "matrix.h"

namespace qtool {
namespace {  // compiled for each instruction set apart: no copy may serve another

constexpr int kMax = 127;
constexpr int kExtraBits = 22;       // of a row's reciprocal beyond its largest value
constexpr int kReciprocalBits = 46;  // fixed-point places of 1/sigma and 1/sum
constexpr int kNormBits = 30;
constexpr int kRootBits = 60;
constexpr int kScoreBits = 24;
constexpr int kExpOctaves = 30;
constexpr int kQuotientBits = 29;  // of a row's reciprocal beyond those of what it divides by
constexpr std::int32_t kInt32Limit = 0x7fffffff;

inline int bit_length(std::uint64_t n) {
  int digits = 0;
  for (; n != 0; n >>= 1) ++digits;
  return digits;
}

inline std::int32_t limit_of(int bits) { return static_cast<std::int32_t>((std::int64_t{1} << (bits - 1)) - 1); }

inline std::int64_t floor_div(std::int64_t a, std::int64_t b) {
  const std::int64_t quotient = a / b;
  return quotient - (a % b < 0);
}

// floor(sqrt(n)) for 0 <= n < 2^62 (7.1).
inline std::int64_t isqrt(std::int64_t n) {
  if (n == 0) return 0;
  std::int64_t x = std::int64_t{1} << ((bit_length(static_cast<std::uint64_t>(n)) + 1) >> 1);
  for (;;) {
    const std::int64_t next = (x + n / x) >> 1;
    if (next >= x) return x;
    x = next;
  }
}

template <class Isa, class T>
std::int32_t largest_magnitude(const T* x, int count) {
  auto top = Isa::set(0);
  int i = 0;
  for (; i + Isa::kLanes <= count; i += Isa::kLanes) {
    const auto value = Isa::load(x + i);
    top = Isa::max(top, Isa::max(value, Isa::sub(Isa::set(0), value)));
  }
  std::int32_t largest = Isa::reduce_max(top);
  for (; i < count; ++i) {
    const std::int32_t value = x[i];
    largest = largest > value ? largest : value;
    largest = largest > -value ? largest : -value;
  }
  return largest;
}

// Codes of a row (3.1 to 3.4), plus `offset`, and the row's largest magnitude, at least 1.
template <class Isa, class T>
std::int32_t quantize_row(const T* x, int count, bool is_unsigned, int offset, std::uint8_t* codes) {
  const std::int32_t found = largest_magnitude<Isa>(x, count), amax = found > 1 ? found : 1;
  const int places = bit_length(static_cast<std::uint64_t>(amax)) + kExtraBits;
  const std::int64_t levels = is_unsigned ? 2 * kMax : kMax;
  const auto factor = static_cast<std::int32_t>((levels << places) / amax);
  const std::int32_t moved = offset - (is_unsigned ? kMax : 0);
  sweep<Isa, Portable>(count, [&](auto isa, int i) {
    using V = decltype(isa);
    V::put(codes + i, V::add(V::scale_round(V::load(x + i), factor, places), V::set(moved)));
  });
  return amax;
}

// What IntLinear.quantize does to a row: smoothing and centering, then codes plus `offset`. Returns amax; `scratch` holds
// a row of int32. Bytes up to the next multiple of four are set, so that none is read before it was written.
template <class Isa, class T>
std::int32_t quantize_input(const IntLinear& linear, const T* x, int offset, std::uint8_t* codes, std::int32_t* scratch) {
  const int n = linear.inputs;
  for (int i = n; i < ceil_div(n, kQuad) * kQuad; ++i) codes[i] = 0;
  const std::int32_t limit = limit_of(linear.dynamic ? linear.in_bits : 8);
  if (linear.in_multiplier != nullptr) {
    sweep<Isa, Portable>(n, [&](auto isa, int i) {
      using V = decltype(isa);
      const auto moved = V::sub(V::set(0), V::load(linear.in_offset + i));
      V::put(scratch + i,
               V::rescale_add(V::load(x + i), V::load(linear.in_multiplier + i), V::load(linear.in_shift + i), moved, limit));
    });
    if (linear.dynamic) return quantize_row<Isa>(scratch, n, linear.is_unsigned, offset, codes);
  } else if (linear.dynamic) {
    return quantize_row<Isa>(x, n, linear.is_unsigned, offset, codes);
  } else {
    sweep<Isa, Portable>(n, [&](auto isa, int i) {
      using V = decltype(isa);
      V::put(scratch + i, V::load(x + i));
    });
  }
  sweep<Isa, Portable>(n, [&](auto isa, int i) {
    using V = decltype(isa);
    V::put(codes + i, V::add(V::load(scratch + i), V::set(offset)));
  });
  return 1;
}

// Calls `done(isa, i, column, y)` with the outputs of row i of sums [count][width] from `column` on (2.2, 3.6); `amax` is
// that of each row.
template <class Isa, class Done>
void finish_sums(const IntLinear& linear, const std::int32_t* amax, int count, int column, const std::int32_t* sums, int width,
                 const Done& done) {
  const IntLinear to = linear;  // a copy that what is stored cannot change
  const std::int32_t limit = limit_of(to.out_bits);
  const int align = to.align;
  sweep<Isa, Portable>(std::min(width, to.outputs - column), [&](auto isa, int i) {
    using V = decltype(isa);
    const int c = column + i;
    const auto correction = to.correction == nullptr ? V::set(0) : V::load(to.correction + c);
    const typename V::Requantizer requantize(correction, V::load(to.bias + c), V::load(to.multiplier + c), V::load(to.shift + c),
                                             limit);
    if (to.dynamic) {
      for (int r = 0; r < count; ++r) done(isa, r, c, requantize.scaled(V::load(sums + r * width + i), amax[r], align));
    } else {
      for (int r = 0; r < count; ++r) done(isa, r, c, requantize.plain(V::load(sums + r * width + i)));
    }
  });
}

// i-LayerNorm of a row (7.2 to 7.5); `out` may be `x`.
template <class Isa>
void norm_row(const IntNorm& norm, const std::int32_t* x, std::int32_t* out) {
  const int n = norm.size;
  std::int64_t sum = 0, variance = norm.eps;
  auto wide = Isa::zero_wide();
  int i = 0;
  for (; i + Isa::kLanes <= n; i += Isa::kLanes) wide = Isa::add_wide(wide, Isa::load(x + i));
  sum = Isa::reduce_wide(wide);
  for (; i < n; ++i) sum += x[i];
  const auto mean = static_cast<std::int32_t>(floor_div(2 * sum + n, 2 * std::int64_t{n}));
  wide = Isa::zero_wide();
  for (i = 0; i + Isa::kLanes <= n; i += Isa::kLanes) {
    wide = Isa::add_squares(wide, Isa::sub(Isa::load(x + i), Isa::set(mean)));
  }
  variance += Isa::reduce_wide(wide);
  for (; i < n; ++i) variance += (std::int64_t{x[i]} - mean) * (std::int64_t{x[i]} - mean);

  int extra = (kRootBits - bit_length(static_cast<std::uint64_t>(variance))) >> 1;
  extra = extra < 0 ? 0 : extra > 15 ? 15 : extra;
  const std::int64_t root = isqrt(variance << (2 * extra));
  const std::int64_t inverse = (std::int64_t{1} << (extra + kReciprocalBits)) / (root > 1 ? root : 1);
  const std::int32_t limit = limit_of(norm.out_bits);
  constexpr int kPlaces = kReciprocalBits - kNormBits;
  const auto scaled = [&](auto isa, int c, auto normal) {
    using V = decltype(isa);
    V::put(out + c, V::rescale_add(normal, V::load(norm.weight + c), V::load(norm.shift + c), V::load(norm.bias + c), limit));
  };
  if (inverse <= kInt32Limit) {
    const auto factor = static_cast<std::int32_t>(inverse);
    sweep<Isa, Portable>(n, [&](auto isa, int c) {
      using V = decltype(isa);
      const auto centered = V::sub(V::load(x + c), V::set(mean));
      scaled(isa, c, V::scale_clamp(centered, factor, kPlaces, kInt32Limit));
    });
    return;
  }
  for (int c = 0; c < n; ++c) {  // a row of tiny numbers: its reciprocal needs 64 bits
    const std::int64_t product = (std::int64_t{x[c]} - mean) * inverse;
    scaled(Portable{}, c, Portable::clamp64((product + (1 << (kPlaces - 1))) >> kPlaces, kInt32Limit));
  }
}

// i-GELU (5.2 to 5.4) and what IntGelu does behind it.
inline std::int32_t polynomial_gelu(const IntActivation& act, std::int64_t x) {
  const std::int64_t root = act.constants[0], one = act.constants[1], offset = act.constants[3];
  const int places = static_cast<int>(act.constants[2]);
  const std::int64_t magnitude = x < 0 ? -x : x, missing = root - (magnitude < root ? magnitude : root);
  const std::int64_t inner = one - missing * missing, erf = x < 0 ? -inner : x > 0 ? inner : 0;
  const std::int64_t sum = erf + one, half = (std::int64_t{1} << places) >> 1;
  const std::int64_t product = x * ((sum + half) >> places);
  std::int64_t y = (((product * act.multiplier) >> (act.shift - 1)) + 1) >> 1;
  y += offset;
  if (act.shifted && y < 0) y = 0;
  return Portable::clamp64(y, limit_of(16));
}

// Stores what the block's activation makes of some outputs of the layer before it.
template <class V>
QTOOL_INLINE void activate(const IntActivation& act, typename V::Int y, std::int16_t* out) {
  if (act.kind == kRelu) {
    V::put(out, V::max(y, V::set(0)));
    return;
  }
  if (act.kind == kTable) {
    V::put(out, V::look_up(act.table, V::add(y, V::set(1 << (act.in_bits - 1)))));
    return;
  }
  std::int32_t values[V::kLanes];
  V::put(static_cast<std::int32_t*>(values), y);
  for (int i = 0; i < V::kLanes; ++i) out[i] = static_cast<std::int16_t>(polynomial_gelu(act, values[i]));
}

// A score so low that its key gets no weight beside any real one: fills rows up to a multiple of kTile.
constexpr std::int32_t kNoScore = -(1 << 30);

// i-exp of a row's distances to its largest score (4.3), `count` being a multiple of kTile: what the scores from i on weigh.
template <class Isa>
class Weights {
 public:
  using Int = typename Isa::Int;

  Weights(const IntAttention& attention, const std::int32_t* scores, int count) : attention_(attention), scores_(scores) {
    auto top = Isa::set(kNoScore);
    for (int i = 0; i < count; i += Isa::kLanes) top = Isa::max(top, Isa::load(scores + i));
    largest_ = Isa::set(Isa::reduce_max(top));
  }

  Int operator()(int i) const {
    const int grid = attention_.grid;
    const Int distance = Isa::sub(largest_, Isa::load(scores_ + i));
    const Int root = Isa::sub(Isa::set(attention_.exp_b), Isa::mask(distance, Isa::set((1 << grid) - 1)));
    const Int mantissa = Isa::add(Isa::mul(root, root), Isa::set(attention_.exp_c));
    return Isa::shift_right_below(mantissa, Isa::shift_right(distance, grid), kExpOctaves);
  }

 private:
  const IntAttention attention_;  // a copy that what is stored cannot change
  const std::int32_t* scores_;
  Int largest_;
};

// All of them in the place of the scores. Returns their sum.
template <class Isa>
std::int64_t weigh_row(const IntAttention& attention, std::int32_t* scores, int count) {
  const Weights<Isa> weights(attention, scores, count);
  auto wide = Isa::zero_wide();
  for (int i = 0; i < count; i += Isa::kLanes) {
    const auto weight = weights(i);
    Isa::put(scores + i, weight);
    wide = Isa::add_wide(wide, weight);
  }
  return Isa::reduce_wide(wide);
}

// Weights as shares of their sum (6.1 to 6.3). The largest score weighs E(0) > 2^14 (math.md, 4), so that the reciprocal
// fits 32 bits.
template <class Isa>
void share_row(const IntAttention& attention, const std::int32_t* weights, int count, std::int64_t sum, const Digits& out) {
  const auto reciprocal = static_cast<std::uint32_t>((std::int64_t{1} << kReciprocalBits) / (sum > 1 ? sum : 1));
  const int places = kReciprocalBits - attention.bits;
  const std::int32_t most = (1 << attention.bits) - 1;
  for (int i = 0; i < count; i += Isa::kLanes) {
    out.template put<Isa>(i, Isa::min(Isa::scale_unsigned(Isa::load(weights + i), reciprocal, places), Isa::set(most)));
  }
}

// One over a number, as sums are multiplied by it (9.1): |sum| * factor / 2^places in units of 2^-bits.
struct Quotient {
  Quotient() = default;
  Quotient(std::int64_t total, int bits) {
    const std::int64_t whole = total < 1 ? 1 : total;
    const int wanted = bit_length(static_cast<std::uint64_t>(whole)) + kQuotientBits, length = wanted < 62 ? wanted : 62;
    factor = static_cast<std::int32_t>((std::int64_t{1} << length) / whole);
    places = length - bits;
  }

  std::int32_t factor = 0;
  int places = 0;
};

}  // namespace
}  // namespace qtool
