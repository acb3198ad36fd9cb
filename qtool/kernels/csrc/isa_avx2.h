// AVX2: 8 lanes. Products of bytes are exact although vpmaddubsw adds pairs in 16 bits: |w| is at most 128 and the
// activation with w's sign 127, so a pair is at most 2 * 128 * 127 = 32,512. (-128 has no opposite in a byte, but as an
// unsigned byte its magnitude is 128: weights may be -128, activations may not.)

#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "isa_portable.h"

namespace qtool {
namespace {  // compiled for each instruction set apart: no copy may serve another

struct Avx2 {
  static constexpr int kLanes = 8;
  // 8 accumulators, two weights and their magnitudes, an activation, ones, and temporaries of the 16 registers.
  static constexpr int kRows = 4, kPanels = 1;
  static constexpr int kOffset = 0;

  using Int = __m256i;
  using Wide = __m256i;

  static Int load(const std::int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static Int load(const std::int16_t* p) {
    return _mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Int load(const std::int8_t* p) {
    return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static void put(std::int32_t* p, Int x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
  static void put(std::int16_t* p, Int x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)));
  }
  static void put(std::uint8_t* p, Int x) {
    const Int low_bytes = _mm256_set1_epi32(0x0c080400);  // the first byte of each lane to the front of its half
    const Int picked = _mm256_shuffle_epi8(x, low_bytes);
    const Int joined = _mm256_permutevar8x32_epi32(picked, _mm256_setr_epi32(0, 4, 0, 0, 0, 0, 0, 0));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(joined));
  }
  static void put(std::int8_t* p, Int x) { put(reinterpret_cast<std::uint8_t*>(p), x); }
  static Int look_up(const std::int16_t* table, Int index) {
    const Int found = _mm256_i32gather_epi32(reinterpret_cast<const int*>(table), index, 2);
    return _mm256_srai_epi32(_mm256_slli_epi32(found, 16), 16);  // the low halves
  }
  static Int look_up(const std::int32_t* table, Int index) {
    return _mm256_i32gather_epi32(reinterpret_cast<const int*>(table), index, 4);
  }
  static Int set(std::int32_t x) { return _mm256_set1_epi32(x); }
  static Int add(Int a, Int b) { return _mm256_add_epi32(a, b); }
  static Int sub(Int a, Int b) { return _mm256_sub_epi32(a, b); }
  static Int mul(Int a, Int b) { return _mm256_mullo_epi32(a, b); }
  static Int min(Int a, Int b) { return _mm256_min_epi32(a, b); }
  static Int max(Int a, Int b) { return _mm256_max_epi32(a, b); }
  static Int mask(Int a, Int b) { return _mm256_and_si256(a, b); }
  static Int at_least(Int x, Int limit, Int value) { return _mm256_andnot_si256(_mm256_cmpgt_epi32(limit, x), value); }
  static Int shift_left(Int a, int places) { return _mm256_sll_epi32(a, _mm_cvtsi32_si128(places)); }
  static Int shift_right(Int a, int places) { return _mm256_sra_epi32(a, _mm_cvtsi32_si128(places)); }
  static Int shift_right_below(Int a, Int places, int end) {
    return _mm256_and_si256(_mm256_srlv_epi32(a, places), _mm256_cmpgt_epi32(set(end), places));
  }

  static Int scale_round(Int x, std::int32_t y, int places) {
    const Int factor = set(y);
    return join(halve(_mm256_mul_epi32(x, factor), places), halve(_mm256_mul_epi32(odd(x), factor), places));
  }
  static Int scale_clamp(Int x, std::int32_t y, int places, std::int32_t limit) {
    const Int factor = set(y);
    return join(clamp64(halve(_mm256_mul_epi32(x, factor), places), limit),
                clamp64(halve(_mm256_mul_epi32(odd(x), factor), places), limit));
  }
  static Int rescale(Int x, Int m, Int s, std::int32_t limit) {
    const Int before = sub(s, set(1));
    return join(clamp64(halve(_mm256_mul_epi32(x, m), even(before)), limit),
                clamp64(halve(_mm256_mul_epi32(odd(x), odd(m)), odd(before)), limit));
  }
  static Int rescale_add(Int x, Int m, Int s, Int addend, std::int32_t limit) {
    const Int before = sub(s, set(1));
    const Int even_sum = _mm256_add_epi64(halve(_mm256_mul_epi32(x, m), even(before)), even_wide(addend));
    const Int odd_sum = _mm256_add_epi64(halve(_mm256_mul_epi32(odd(x), odd(m)), odd(before)), odd_wide(addend));
    return join(clamp64(even_sum, limit), clamp64(odd_sum, limit));
  }
  static Int scale_unsigned(Int x, std::uint32_t y, int places) {
    const Int factor = set(static_cast<std::int32_t>(y));
    const Int half = _mm256_set1_epi64x(std::int64_t{1} << (places - 1));
    const __m128i count = _mm_cvtsi32_si128(places);
    return join(_mm256_srl_epi64(_mm256_add_epi64(_mm256_mul_epu32(x, factor), half), count),
                _mm256_srl_epi64(_mm256_add_epi64(_mm256_mul_epu32(odd(x), factor), half), count));
  }

  using Requantizer = PlainRequantizer<Avx2>;

  static Wide zero_wide() { return _mm256_setzero_si256(); }
  static Wide add_wide(Wide sum, Int x) { return _mm256_add_epi64(sum, _mm256_add_epi64(even_wide(x), odd_wide(x))); }
  static Wide add_squares(Wide sum, Int x) {
    const Int high = odd(x);
    return _mm256_add_epi64(sum, _mm256_add_epi64(_mm256_mul_epi32(x, x), _mm256_mul_epi32(high, high)));
  }
  static std::int64_t reduce_wide(Wide x) {
    alignas(32) std::int64_t parts[4];
    _mm256_store_si256(reinterpret_cast<__m256i*>(parts), x);
    return parts[0] + parts[1] + parts[2] + parts[3];
  }
  static std::int32_t reduce_max(Int x) {
    __m128i half = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
  }

  static void unpack(const std::uint8_t* nibbles, std::int8_t* codes) {
    const Int eights = set(0x08080808);
    for (int half = 0; half < 2; ++half) {
      const Int pairs = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(nibbles + 16 * half)));
      const Int spread = _mm256_and_si256(_mm256_or_si256(pairs, _mm256_slli_epi16(pairs, 4)), set(0x0f0f0f0f));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + 32 * half), _mm256_sub_epi8(_mm256_xor_si256(spread, eights), eights));
    }
  }

  static constexpr int kSpin = 8 * 32;
  static std::int32_t spin(std::int64_t iterations) {
    Int a = set(0x01010101), b = set(0x02020202), sums[8];
    const Int ones = _mm256_set1_epi16(1);
    for (int j = 0; j < 8; ++j) sums[j] = set(j);
    for (std::int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        __asm__ volatile("" : "+x"(a));  // another operand, for all that the compiler knows
        sums[j] = add(sums[j], _mm256_madd_epi16(_mm256_maddubs_epi16(a, _mm256_sign_epi8(b, a)), ones));
      }
    }
    alignas(32) std::int32_t lanes[8];
    for (int j = 1; j < 8; ++j) sums[0] = add(sums[0], sums[j]);
    put(static_cast<std::int32_t*>(lanes), sums[0]);
    return lanes[0];
  }

  template <int R, int P>
  static void tile(const std::uint8_t* a, std::ptrdiff_t stride, const std::int8_t* w, std::ptrdiff_t panel, std::ptrdiff_t steps,
                   std::int32_t* out) {
    static_assert(P == 1, "one panel is two registers");
    const Int ones = _mm256_set1_epi16(1);
    Int sums[R][2];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = _mm256_setzero_si256();
    for (std::ptrdiff_t k = 0; k < steps; ++k) {
      const auto* weights = reinterpret_cast<const __m256i*>(w + k * 64);
      if constexpr (R == 1) __builtin_prefetch(w + k * 64 + 4096, 0, 0);  // one row waits for memory, not for its products
      const Int low = _mm256_loadu_si256(weights), high = _mm256_loadu_si256(weights + 1);
      const Int size_low = _mm256_abs_epi8(low), size_high = _mm256_abs_epi8(high);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        std::int32_t four;
        std::memcpy(&four, a + r * stride + k * 4, 4);
        const Int activation = _mm256_set1_epi32(four);
        const Int pairs_low = _mm256_maddubs_epi16(size_low, _mm256_sign_epi8(activation, low));
        const Int pairs_high = _mm256_maddubs_epi16(size_high, _mm256_sign_epi8(activation, high));
        sums[r][0] = _mm256_add_epi32(sums[r][0], _mm256_madd_epi16(pairs_low, ones));
        sums[r][1] = _mm256_add_epi32(sums[r][1], _mm256_madd_epi16(pairs_high, ones));
      }
    }
    (void)panel;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      put(out + r * 16, sums[r][0]);
      put(out + r * 16 + 8, sums[r][1]);
    }
  }

 private:
  static Int odd(Int x) { return _mm256_srli_epi64(x, 32); }
  static Int even(Int x) { return _mm256_and_si256(x, _mm256_set1_epi64x(0xffffffff)); }
  static Int even_wide(Int x) {  // there is no arithmetic 64-bit shift: the sign is put above the lane
    return _mm256_blend_epi32(x, _mm256_slli_epi64(_mm256_srai_epi32(x, 31), 32), 0xaa);
  }
  static Int odd_wide(Int x) { return _mm256_blend_epi32(odd(x), _mm256_srai_epi32(x, 31), 0xaa); }
  static Int join(Int even, Int odd) { return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa); }
  // x >> places of signed x: with 2^63 added no bit is lost to the logical shift, and 2^63 >> places is taken off.
  static Int shift64(Int x, Int places) {
    const Int sign = _mm256_set1_epi64x(INT64_MIN);
    return _mm256_sub_epi64(_mm256_srlv_epi64(_mm256_xor_si256(x, sign), places), _mm256_srlv_epi64(sign, places));
  }
  // x / 2^places of |x| <= 2^62, rounded half up; 0 <= places <= 62.
  static Int halve(Int x, int places) {
    const Int half = _mm256_set1_epi64x((std::int64_t{1} << places) >> 1);
    return shift64(_mm256_add_epi64(x, half), _mm256_set1_epi64x(places));
  }
  static Int halve(Int x, Int places_but_one) {
    return shift64(_mm256_add_epi64(shift64(x, places_but_one), _mm256_set1_epi64x(1)), _mm256_set1_epi64x(1));
  }
  static Int clamp64(Int x, std::int32_t limit) {
    const Int top = _mm256_set1_epi64x(limit), bottom = _mm256_set1_epi64x(-std::int64_t{limit});
    x = _mm256_blendv_epi8(x, top, _mm256_cmpgt_epi64(x, top));
    return _mm256_blendv_epi8(x, bottom, _mm256_cmpgt_epi64(bottom, x));
  }
};

}  // namespace
}  // namespace qtool
