// One lane of plain C++: the instruction set of a CPU without vector instructions that qtool knows, and what the vector
// code falls back to for the elements at the end of a row. Every other isa_*.h offers the same operations on more lanes.
//
// Arithmetic is exact on the ranges named; shifts of negative numbers are arithmetic (as every compiler of qtool's
// platforms has them, and as C++20 demands).

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

// For what a call would cost more than what it does, and for functions that only prefetch: GNU's compiler drops calls of
// those as being without effect.
#if defined(_MSC_VER)
#define QTOOL_INLINE __forceinline
#else
#define QTOOL_INLINE inline __attribute__((always_inline))
#endif

namespace qtool {
namespace {  // compiled for each instruction set apart: no copy may serve another

// From sums of products to the grid of an output (docs/math.md, 2.2 and 3.6), for rows that share their channels.
template <class Isa>
class PlainRequantizer {
 public:
  using Int = typename Isa::Int;

  PlainRequantizer(Int correction, Int bias, Int m, Int s, std::int32_t limit)
      : correction_(correction), bias_(bias), m_(m), s_(s), limit_(limit) {}

  // sat((((sums + correction) * amax + half) >> align) + bias) rescaled); the number in the middle fits int32.
  Int scaled(Int sums, std::int32_t amax, int align) const {
    return plain_of(Isa::scale_round(Isa::add(sums, correction_), amax, align));
  }
  // The same without amax.
  Int plain(Int sums) const { return plain_of(Isa::add(sums, correction_)); }

 private:
  Int plain_of(Int x) const { return Isa::rescale(Isa::add(x, bias_), m_, s_, limit_); }

  Int correction_, bias_, m_, s_;
  std::int32_t limit_;
};

struct Portable {
  static constexpr int kLanes = 1;
  // A block of the matrix product: rows of activations by panels of 16 outputs.
  static constexpr int kRows = 4, kPanels = 1;
  // What is added to an int8 code of an activation before it is stored for the product.
  static constexpr int kOffset = 0;

  using Int = std::int32_t;   // kLanes times int32
  using Wide = std::int64_t;  // partial sums, int64

  static Int load(const std::int32_t* p) { return *p; }
  static Int load(const std::int16_t* p) { return *p; }
  static Int load(const std::int8_t* p) { return *p; }
  static void put(std::int32_t* p, Int x) { *p = x; }
  static void put(std::int16_t* p, Int x) { *p = static_cast<std::int16_t>(x); }
  static void put(std::uint8_t* p, Int x) { *p = static_cast<std::uint8_t>(x); }
  static void put(std::int8_t* p, Int x) { put(reinterpret_cast<std::uint8_t*>(p), x); }
  // table[index], from a table with one entry more than there are indices.
  static Int look_up(const std::int16_t* table, Int index) { return table[index]; }
  static Int look_up(const std::int32_t* table, Int index) { return table[index]; }
  static Int set(std::int32_t x) { return x; }
  static Int add(Int a, Int b) { return static_cast<Int>(static_cast<std::uint32_t>(a) + static_cast<std::uint32_t>(b)); }
  static Int sub(Int a, Int b) { return static_cast<Int>(static_cast<std::uint32_t>(a) - static_cast<std::uint32_t>(b)); }
  static Int mul(Int a, Int b) { return static_cast<Int>(static_cast<std::uint32_t>(a) * static_cast<std::uint32_t>(b)); }
  static Int min(Int a, Int b) { return a < b ? a : b; }
  static Int max(Int a, Int b) { return a > b ? a : b; }
  static Int mask(Int a, Int b) { return a & b; }
  // `value` by lane where x >= limit, and 0 elsewhere.
  static Int at_least(Int x, Int limit, Int value) { return x >= limit ? value : 0; }
  static Int shift_left(Int a, int places) { return static_cast<Int>(static_cast<std::uint32_t>(a) << places); }
  static Int shift_right(Int a, int places) { return a >> places; }
  // a >> places by lane for a >= 0, and 0 where places >= end (end <= 31, places >= 0).
  static Int shift_right_below(Int a, Int places, int end) { return places < end ? a >> places : 0; }

  // (x * y + half) >> places, half up, for products whose result fits int32.
  static Int scale_round(Int x, std::int32_t y, int places) {
    const std::int64_t product = std::int64_t{x} * y;
    return static_cast<Int>(places == 0 ? product : ((product >> (places - 1)) + 1) >> 1);
  }
  // The same, saturated to +-limit.
  static Int scale_clamp(Int x, std::int32_t y, int places, std::int32_t limit) {
    const std::int64_t product = std::int64_t{x} * y;
    return clamp64(places == 0 ? product : ((product >> (places - 1)) + 1) >> 1, limit);
  }
  // x * m / 2^s rounded half up (1 <= s <= 62), plus `addend`, saturated to +-limit.
  static Int rescale(Int x, Int m, Int s, std::int32_t limit) {
    return clamp64((((std::int64_t{x} * m) >> (s - 1)) + 1) >> 1, limit);
  }
  static Int rescale_add(Int x, Int m, Int s, Int addend, std::int32_t limit) {
    return clamp64(((((std::int64_t{x} * m) >> (s - 1)) + 1) >> 1) + addend, limit);
  }
  // (x * y + half) >> places for 0 <= x < 2^31 and any unsigned y, 0 < places; the result must fit int32.
  static Int scale_unsigned(Int x, std::uint32_t y, int places) {
    const std::uint64_t product = std::uint64_t{static_cast<std::uint32_t>(x)} * y;
    return static_cast<Int>((product + (std::uint64_t{1} << (places - 1))) >> places);
  }

  using Requantizer = PlainRequantizer<Portable>;

  static Wide zero_wide() { return 0; }
  static Wide add_wide(Wide sum, Int x) { return sum + x; }
  static Wide add_squares(Wide sum, Int x) { return sum + std::int64_t{x} * x; }
  static std::int64_t reduce_wide(Wide x) { return x; }
  static std::int32_t reduce_max(Int x) { return x; }

  // 64 codes of 4 bits, low nibble first, as int8.
  static void unpack(const std::uint8_t* nibbles, std::int8_t* codes) {
    for (int i = 0; i < 32; ++i) {
      codes[2 * i] = static_cast<std::int8_t>(((nibbles[i] & 15) ^ 8) - 8);
      codes[2 * i + 1] = static_cast<std::int8_t>(((nibbles[i] >> 4) ^ 8) - 8);
    }
  }

  // A loop of nothing but multiply-adds, for measurements: this many times `kSpin` int8 products.
  static constexpr int kSpin = 64;
  static std::int32_t spin(std::int64_t iterations) {
    std::uint8_t a[4] = {1, 2, 3, 4};
    std::int8_t w[64] = {};
    std::int32_t out[16];
    std::int32_t sum = 0;
    for (std::int64_t i = 0; i < iterations; ++i) {
      a[0] = static_cast<std::uint8_t>(i & 1);
      tile<1, 1>(a, 4, w, 64, 1, out);
      sum += out[i & 15];
    }
    return sum;
  }

  // out[r][16 p + c] = sum over k of a[r][k] * w[p][k / 4][c][k % 4]; `a` holds codes plus kOffset.
  template <int R, int P>
  static void tile(const std::uint8_t* a, std::ptrdiff_t stride, const std::int8_t* w, std::ptrdiff_t panel, std::ptrdiff_t steps,
                   std::int32_t* out) {
    for (int r = 0; r < R; ++r) {
      for (int p = 0; p < P; ++p) {
        std::int32_t sums[16] = {};
        const auto* row = reinterpret_cast<const std::int8_t*>(a + r * stride);
        const std::int8_t* weights = w + p * panel;
        for (std::ptrdiff_t k = 0; k < steps; ++k, row += 4, weights += 64) {
          for (int c = 0; c < 16; ++c) {
            for (int i = 0; i < 4; ++i) sums[c] += row[i] * weights[4 * c + i];
          }
        }
        std::memcpy(out + (r * P + p) * 16, sums, sizeof sums);
      }
    }
  }

  static Int clamp64(std::int64_t x, std::int32_t limit) {
    return static_cast<Int>(x < -limit ? -limit : x > limit ? limit : x);
  }
};

}  // namespace
}  // namespace qtool
