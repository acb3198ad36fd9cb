// Single precision on the lanes of each instruction set. Nothing is contracted by the compiler (-ffp-contract=off): a
// fused multiply-add is one where the code says so, so that epilogues round like the reference's.

#pragma once

#include <cmath>

#include "isa_portable.h"
#if defined(__AVX512F__)
#include "isa_avx512vnni.h"
#elif defined(__AVX2__)
#include "isa_avx2.h"
#endif

namespace qtool {
namespace {

struct FloatPortable : Portable {
  static constexpr int kFloatRows = 4, kFloatPanels = 1;
  using Float = float;

  static Float load_float(const float* p) { return *p; }
  static void store_float(float* p, Float x) { *p = x; }
  static Float set_float(float x) { return x; }
  static Float add_float(Float a, Float b) { return a + b; }
  static Float sub_float(Float a, Float b) { return a - b; }
  static Float mul_float(Float a, Float b) { return a * b; }
  static Float div_float(Float a, Float b) { return a / b; }
  static Float fused(Float a, Float b, Float c) { return std::fma(a, b, c); }  // a * b + c
  static Float max_float(Float a, Float b) { return a > b ? a : b; }
  static Float min_float(Float a, Float b) { return a < b ? a : b; }
  static Float abs_float(Float a) { return std::fabs(a); }
  static Float floor_float(Float a) { return std::floor(a); }
  static Float to_float(Int a) { return static_cast<float>(a); }
  // INT32_MIN for what int32 does not hold, as the vector instructions give.
  static Int to_int(Float a) { return a >= -2147483648.0f && a < 2147483648.0f ? static_cast<Int>(a) : INT32_MIN; }
  // a * 2^n for -126 <= n <= 127
  static Float scale_float(Float a, Int n) {
    const std::uint32_t bits = static_cast<std::uint32_t>(n + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return a * power;
  }
  static Float copy_sign(Float magnitude, Float sign) { return std::copysign(magnitude, sign); }
  // Codes of one output and four inputs, a byte or a nibble each, and one of them.
  static Int load_quads(const std::uint8_t* p) {
    return static_cast<Int>(p[0] | p[1] << 8 | p[2] << 16 | static_cast<std::uint32_t>(p[3]) << 24);
  }
  static Int load_pairs(const std::uint8_t* p) { return p[0] | p[1] << 8; }
  template <int I, bool kNibbles>
  static Float code(Int quad) {
    constexpr int kBits = kNibbles ? 4 : 8;
    return static_cast<float>(static_cast<Int>(static_cast<std::uint32_t>(quad) << (32 - kBits * (I + 1))) >> (32 - kBits));
  }
  static float reduce_add_float(Float a) { return a; }
  static float reduce_max_float(Float a) { return a; }
};

#if defined(__AVX512F__)

struct FloatAvx512Vnni : Avx512Vnni {
  static constexpr int kFloatRows = 8, kFloatPanels = 3;
  using Float = __m512;

  static Float load_float(const float* p) { return _mm512_loadu_ps(p); }
  static void store_float(float* p, Float x) { _mm512_storeu_ps(p, x); }
  static Float set_float(float x) { return _mm512_set1_ps(x); }
  static Float add_float(Float a, Float b) { return _mm512_add_ps(a, b); }
  static Float sub_float(Float a, Float b) { return _mm512_sub_ps(a, b); }
  static Float mul_float(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static Float div_float(Float a, Float b) { return _mm512_div_ps(a, b); }
  static Float fused(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static Float max_float(Float a, Float b) { return _mm512_max_ps(a, b); }
  static Float min_float(Float a, Float b) { return _mm512_min_ps(a, b); }
  static Float abs_float(Float a) { return _mm512_abs_ps(a); }
  static Float floor_float(Float a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
  static Float to_float(Int a) { return _mm512_cvtepi32_ps(a); }
  static Int to_int(Float a) { return _mm512_cvttps_epi32(a); }
  static Float scale_float(Float a, Int n) {
    return _mm512_mul_ps(a, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n, set(127)), 23)));
  }
  static Float copy_sign(Float magnitude, Float sign) {
    const Int bit = set(INT32_MIN);
    return _mm512_castsi512_ps(_mm512_or_si512(_mm512_andnot_si512(bit, _mm512_castps_si512(magnitude)),
                                               _mm512_and_si512(bit, _mm512_castps_si512(sign))));
  }
  static Int load_quads(const std::uint8_t* p) { return _mm512_loadu_si512(p); }
  static Int load_pairs(const std::uint8_t* p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  template <int I, bool kNibbles>
  static Float code(Int quads) {
    constexpr int kBits = kNibbles ? 4 : 8;
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(quads, 32 - kBits * (I + 1)), 32 - kBits));
  }
  static float reduce_add_float(Float a) { return _mm512_reduce_add_ps(a); }
  static float reduce_max_float(Float a) { return _mm512_reduce_max_ps(a); }
};
using FloatIsa = FloatAvx512Vnni;

#elif defined(__AVX2__)

struct FloatAvx2 : Avx2 {
  static constexpr int kFloatRows = 4, kFloatPanels = 1;
  using Float = __m256;

  static Float load_float(const float* p) { return _mm256_loadu_ps(p); }
  static void store_float(float* p, Float x) { _mm256_storeu_ps(p, x); }
  static Float set_float(float x) { return _mm256_set1_ps(x); }
  static Float add_float(Float a, Float b) { return _mm256_add_ps(a, b); }
  static Float sub_float(Float a, Float b) { return _mm256_sub_ps(a, b); }
  static Float mul_float(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static Float div_float(Float a, Float b) { return _mm256_div_ps(a, b); }
  static Float fused(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  static Float max_float(Float a, Float b) { return _mm256_max_ps(a, b); }
  static Float min_float(Float a, Float b) { return _mm256_min_ps(a, b); }
  static Float abs_float(Float a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
  static Float floor_float(Float a) { return _mm256_floor_ps(a); }
  static Float to_float(Int a) { return _mm256_cvtepi32_ps(a); }
  static Int to_int(Float a) { return _mm256_cvttps_epi32(a); }
  static Float scale_float(Float a, Int n) {
    return _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, set(127)), 23)));
  }
  static Float copy_sign(Float magnitude, Float sign) {
    const Float bit = _mm256_set1_ps(-0.0f);
    return _mm256_or_ps(_mm256_andnot_ps(bit, magnitude), _mm256_and_ps(bit, sign));
  }
  static Int load_quads(const std::uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static Int load_pairs(const std::uint8_t* p) {
    return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  template <int I, bool kNibbles>
  static Float code(Int quads) {
    constexpr int kBits = kNibbles ? 4 : 8;
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(quads, 32 - kBits * (I + 1)), 32 - kBits));
  }
  static float reduce_add_float(Float a) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
  }
  static float reduce_max_float(Float a) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_shuffle_ps(half, half, 1)));
  }
};
using FloatIsa = FloatAvx2;

#else
using FloatIsa = FloatPortable;
#endif

}  // namespace
}  // namespace qtool
