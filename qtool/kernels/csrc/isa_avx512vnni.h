// AVX512 (F, BW, DQ, VL) with VNNI: 16 lanes, and a dot product of four unsigned by signed bytes a lane.

#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace qtool {
namespace {  // compiled for each instruction set apart: no copy may serve another

struct Avx512Vnni {
  static constexpr int kLanes = 16;
  // 24 accumulators, three weights and one activation of the 32 registers.
  static constexpr int kRows = 8, kPanels = 3;
  // vpdpbusd takes unsigned activations: codes in +-127 are stored as 0 ... 254.
  static constexpr int kOffset = 127;

  using Int = __m512i;
  using Wide = __m512i;

  static Int load(const std::int32_t* p) { return _mm512_loadu_si512(p); }
  static Int load(const std::int16_t* p) {
    return _mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static Int load(const std::int8_t* p) {
    return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static void put(std::int32_t* p, Int x) { _mm512_storeu_si512(p, x); }
  static void put(std::int16_t* p, Int x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(x));
  }
  static void put(std::uint8_t* p, Int x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x));
  }
  static void put(std::int8_t* p, Int x) { put(reinterpret_cast<std::uint8_t*>(p), x); }
  static Int look_up(const std::int16_t* table, Int index) { return _mm512_i32gather_epi32(index, table, 2); }  // the low halves
  static Int look_up(const std::int32_t* table, Int index) { return _mm512_i32gather_epi32(index, table, 4); }
  static Int set(std::int32_t x) { return _mm512_set1_epi32(x); }
  static Int add(Int a, Int b) { return _mm512_add_epi32(a, b); }
  static Int sub(Int a, Int b) { return _mm512_sub_epi32(a, b); }
  static Int mul(Int a, Int b) { return _mm512_mullo_epi32(a, b); }
  static Int min(Int a, Int b) { return _mm512_min_epi32(a, b); }
  static Int max(Int a, Int b) { return _mm512_max_epi32(a, b); }
  static Int mask(Int a, Int b) { return _mm512_and_si512(a, b); }
  static Int at_least(Int x, Int limit, Int value) { return _mm512_maskz_mov_epi32(_mm512_cmpge_epi32_mask(x, limit), value); }
  static Int shift_left(Int a, int places) { return _mm512_sll_epi32(a, _mm_cvtsi32_si128(places)); }
  static Int shift_right(Int a, int places) { return _mm512_sra_epi32(a, _mm_cvtsi32_si128(places)); }
  static Int shift_right_below(Int a, Int places, int end) {
    return _mm512_maskz_srlv_epi32(_mm512_cmplt_epi32_mask(places, set(end)), a, places);
  }

  static Int scale_round(Int x, std::int32_t y, int places) {
    const Int factor = set(y);
    return join(halve(_mm512_mul_epi32(x, factor), places), halve(_mm512_mul_epi32(odd(x), factor), places));
  }
  static Int scale_clamp(Int x, std::int32_t y, int places, std::int32_t limit) {
    const Int factor = set(y);
    return join(clamp64(halve(_mm512_mul_epi32(x, factor), places), limit),
                clamp64(halve(_mm512_mul_epi32(odd(x), factor), places), limit));
  }
  static Int rescale(Int x, Int m, Int s, std::int32_t limit) {
    const Int before = sub(s, set(1));
    return join(clamp64(halve(_mm512_mul_epi32(x, m), _mm512_and_si512(before, even_lanes())), limit),
                clamp64(halve(_mm512_mul_epi32(odd(x), odd(m)), odd(before)), limit));
  }
  static Int rescale_add(Int x, Int m, Int s, Int addend, std::int32_t limit) {
    const Int before = sub(s, set(1));
    const Int even_sum = _mm512_add_epi64(halve(_mm512_mul_epi32(x, m), _mm512_and_si512(before, even_lanes())),
                                          _mm512_srai_epi64(_mm512_slli_epi64(addend, 32), 32));
    const Int odd_sum =
        _mm512_add_epi64(halve(_mm512_mul_epi32(odd(x), odd(m)), odd(before)), _mm512_srai_epi64(addend, 32));
    return join(clamp64(even_sum, limit), clamp64(odd_sum, limit));
  }
  static Int scale_unsigned(Int x, std::uint32_t y, int places) {
    const Int factor = set(static_cast<std::int32_t>(y));
    const Int half = _mm512_set1_epi64(std::int64_t{1} << (places - 1));
    const __m128i count = _mm_cvtsi32_si128(places);
    return join(_mm512_srl_epi64(_mm512_add_epi64(_mm512_mul_epu32(x, factor), half), count),
                _mm512_srl_epi64(_mm512_add_epi64(_mm512_mul_epu32(odd(x), factor), half), count));
  }

  class Requantizer {
   public:
    Requantizer(Int correction, Int bias, Int m, Int s, std::int32_t limit)
        : correction_(correction), even_(bias, m, _mm512_and_si512(s, even_lanes())), odd_(odd(bias), odd(m), odd(s)),
          top_(set(limit)), limit_(limit), narrow_(_mm512_cmplt_epi32_mask(s, set(31)) == 0) {}

    Int scaled(Int sums, std::int32_t amax, int align) const {
      const Int x = add(sums, correction_), factor = set(amax);
      const Int half = _mm512_set1_epi64((std::int64_t{1} << align) >> 1);
      const __m128i places = _mm_cvtsi32_si128(align);
      return finish(_mm512_sra_epi64(_mm512_add_epi64(_mm512_mul_epi32(x, factor), half), places),
                    _mm512_sra_epi64(_mm512_add_epi64(_mm512_mul_epi32(odd(x), factor), half), places));
    }
    Int plain(Int sums) const {
      const Int x = add(sums, correction_);
      return finish(x, odd(x));
    }

   private:
    // Every other channel, its numbers in the low halves of 64-bit lanes.
    struct Half {
      Half(Int bias_, Int m_, Int s_)
          : bias(bias_), m(m_), s(s_), half(_mm512_sllv_epi64(_mm512_set1_epi64(1), _mm512_sub_epi64(s_, _mm512_set1_epi64(1)))) {}
      Int rescale(Int x) const {
        return _mm512_srav_epi64(_mm512_add_epi64(_mm512_mul_epi32(_mm512_add_epi32(x, bias), m), half), s);
      }
      Int bias, m, s, half;
    };

    Int finish(Int even, Int odd) const {
      even = even_.rescale(even), odd = odd_.rescale(odd);
      // Where every ratio is below one, what comes out fits int32 before it is clamped.
      if (narrow_) return max(min(join(even, odd), top_), sub(set(0), top_));
      return join(clamp64(even, limit_), clamp64(odd, limit_));
    }

    Int correction_;
    Half even_, odd_;
    Int top_;
    std::int32_t limit_;
    bool narrow_;
  };

  static Wide zero_wide() { return _mm512_setzero_si512(); }
  static Wide add_wide(Wide sum, Int x) {
    const Wide low = _mm512_srai_epi64(_mm512_slli_epi64(x, 32), 32);
    return _mm512_add_epi64(sum, _mm512_add_epi64(low, _mm512_srai_epi64(x, 32)));
  }
  static Wide add_squares(Wide sum, Int x) {
    const Int high = odd(x);
    return _mm512_add_epi64(sum, _mm512_add_epi64(_mm512_mul_epi32(x, x), _mm512_mul_epi32(high, high)));
  }
  static std::int64_t reduce_wide(Wide x) { return _mm512_reduce_add_epi64(x); }
  static std::int32_t reduce_max(Int x) { return _mm512_reduce_max_epi32(x); }

  // 64 codes of 4 bits, low nibble first, as int8.
  static void unpack(const std::uint8_t* nibbles, std::int8_t* codes) {
    const Int pairs = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(nibbles)));
    const Int spread = _mm512_and_si512(_mm512_or_si512(pairs, _mm512_slli_epi16(pairs, 4)), set(0x0f0f0f0f));
    _mm512_storeu_si512(codes, _mm512_sub_epi8(_mm512_xor_si512(spread, set(0x08080808)), set(0x08080808)));
  }

  // A loop of nothing but multiply-adds, for measurements: this many of `kSpin` int8 products each.
  static constexpr int kSpin = 12 * 64;
  static std::int32_t spin(std::int64_t iterations) {
    Int a = set(0x01010101), b = set(0x02020202), sums[12];
    for (int j = 0; j < 12; ++j) sums[j] = set(j);
    for (std::int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 12
      for (int j = 0; j < 12; ++j) {
        __asm__ volatile("" : "+v"(a));  // another operand, for all that the compiler knows
        sums[j] = _mm512_dpbusd_epi32(sums[j], a, b);
      }
    }
    for (int j = 1; j < 12; ++j) sums[0] = add(sums[0], sums[j]);
    return _mm512_reduce_add_epi32(sums[0]);
  }

  template <int R, int P>
  static void tile(const std::uint8_t* a, std::ptrdiff_t stride, const std::int8_t* w, std::ptrdiff_t panel, std::ptrdiff_t steps,
                   std::int32_t* out) {
    Int sums[R][P];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) sums[r][p] = _mm512_setzero_si512();
    }
    for (std::ptrdiff_t k = 0; k < steps; ++k) {
      Int weights[P];
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) weights[p] = _mm512_loadu_si512(w + p * panel + k * 64);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        std::int32_t four;
        std::memcpy(&four, a + r * stride + k * 4, 4);
        const Int activation = _mm512_set1_epi32(four);
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) sums[r][p] = _mm512_dpbusd_epi32(sums[r][p], activation, weights[p]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) _mm512_storeu_si512(out + (r * P + p) * 16, sums[r][p]);
    }
  }

 private:
  // Lanes 1, 3, 5 ... where 64-bit instructions read their operands.
  static Int odd(Int x) { return _mm512_srli_epi64(x, 32); }
  static Int even_lanes() { return _mm512_set1_epi64(0xffffffff); }
  static Int join(Int even, Int odd) { return _mm512_mask_shuffle_epi32(even, 0xaaaa, odd, _MM_PERM_CCAA); }
  // x / 2^places of |x| <= 2^62, rounded half up; 0 <= places <= 62.
  static Int halve(Int x, int places) {
    const Int half = _mm512_set1_epi64((std::int64_t{1} << places) >> 1);
    return _mm512_sra_epi64(_mm512_add_epi64(x, half), _mm_cvtsi32_si128(places));
  }
  static Int halve(Int x, Int places_but_one) {
    return _mm512_srai_epi64(_mm512_add_epi64(_mm512_srav_epi64(x, places_but_one), _mm512_set1_epi64(1)), 1);
  }
  static Int clamp64(Int x, std::int32_t limit) {
    const Int top = _mm512_set1_epi64(limit);
    return _mm512_max_epi64(_mm512_min_epi64(x, top), _mm512_sub_epi64(_mm512_setzero_si512(), top));
  }
};

}  // namespace
}  // namespace qtool
