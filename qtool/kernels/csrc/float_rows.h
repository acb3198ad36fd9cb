// Float operations on one row at a time.

#pragma once

#include "float.h"
#include "isa_float.h"
#include "matrix.h"

namespace qtool {
namespace {

constexpr float kTiny = 1.17549435e-38f;  // the smallest normal number: no scale is below it

template <class Isa, class Body>
void sweep_float(int count, const Body& body) {
  sweep<Isa, FloatPortable>(count, body);
}

// e^x for x <= 0 (Cephes' expf: two-part ln2, polynomial of degree 5); below e^-87 it is e^-87, which no sum notices.
template <class V>
typename V::Float exponential(typename V::Float x) {
  x = V::max_float(x, V::set_float(-87.0f));
  const auto octave = V::floor_float(V::fused(x, V::set_float(1.44269504f), V::set_float(0.5f)));
  auto r = V::fused(octave, V::set_float(-0.693359375f), x);
  r = V::fused(octave, V::set_float(2.12194440e-4f), r);
  auto p = V::set_float(1.9875691500e-4f);
  p = V::fused(p, r, V::set_float(1.3981999507e-3f));
  p = V::fused(p, r, V::set_float(8.3334519073e-3f));
  p = V::fused(p, r, V::set_float(4.1665795894e-2f));
  p = V::fused(p, r, V::set_float(1.6666665459e-1f));
  p = V::fused(p, r, V::set_float(5.0000001201e-1f));
  p = V::fused(V::mul_float(p, r), r, V::add_float(r, V::set_float(1.0f)));
  return V::scale_float(p, V::to_int(octave));
}

// x * Phi(x), with erf by Abramowitz and Stegun, 7.1.26 (absolute error 1.5e-7).
template <class V>
typename V::Float gelu(typename V::Float x) {
  const auto z = V::abs_float(V::mul_float(x, V::set_float(0.70710678f)));
  const auto t = V::div_float(V::set_float(1.0f), V::fused(z, V::set_float(0.3275911f), V::set_float(1.0f)));
  auto p = V::set_float(1.061405429f);
  p = V::fused(p, t, V::set_float(-1.453152027f));
  p = V::fused(p, t, V::set_float(1.421413741f));
  p = V::fused(p, t, V::set_float(-0.284496736f));
  p = V::fused(p, t, V::set_float(0.254829592f));
  const auto tail = V::mul_float(V::mul_float(p, t), exponential<V>(V::sub_float(V::set_float(0.0f), V::mul_float(z, z))));
  const auto erf = V::copy_sign(V::sub_float(V::set_float(1.0f), tail), x);
  const auto half = V::mul_float(x, V::set_float(0.5f));
  return V::fused(half, erf, half);
}

// x / (1 + e^-x); what is below -100 is nothing in float32.
template <class V>
typename V::Float silu(typename V::Float x) {
  x = V::max_float(V::set_float(-100.0f), x);  // in this order a NaN stays
  const auto one = V::set_float(1.0f);
  const auto weight = exponential<V>(V::sub_float(V::set_float(0.0f), V::abs_float(x)));
  const auto above = V::max_float(weight, V::copy_sign(one, x));  // 1 for x >= 0, else e^x
  return V::mul_float(x, V::div_float(above, V::add_float(one, weight)));
}

// Token-wise codes (or those of a static scale), plus `offset`; returns the row's scale. A row with an infinity or NaN
// gets a scale that is not finite.
template <class Isa>
float quantize_row(const QLinear& linear, const float* x, int offset, std::uint8_t* codes) {
  const int n = linear.inputs;
  auto top = Isa::set_float(0.0f), spoiled = Isa::set_float(0.0f);
  int i = 0;
  for (; i + Isa::kLanes <= n; i += Isa::kLanes) {
    const auto value = Isa::load_float(x + i);
    top = Isa::max_float(top, Isa::abs_float(value));
    spoiled = Isa::fused(value, Isa::set_float(0.0f), spoiled);
  }
  float largest = Isa::reduce_max_float(top), nothing = Isa::reduce_add_float(spoiled);
  for (; i < n; ++i) {
    largest = std::fabs(x[i]) > largest ? std::fabs(x[i]) : largest;
    nothing += x[i] * 0.0f;
  }
  const bool is_static = linear.act_scale != nullptr;
  float scale = is_static ? *linear.act_scale : largest / 127.0f;
  if (!is_static && scale < kTiny) scale = kTiny;
  sweep_float<Isa>(n, [&](auto isa, int j) {
    using V = decltype(isa);
    const auto ratio = V::div_float(V::load_float(x + j), V::set_float(scale));
    auto level = V::floor_float(V::add_float(ratio, V::set_float(0.5f)));
    if (is_static) level = V::max_float(V::min_float(level, V::set_float(127.0f)), V::set_float(-127.0f));
    V::put(codes + j, V::add(V::to_int(level), V::set(offset)));
  });
  for (int j = n; j < ceil_div(n, kQuad) * kQuad; ++j) codes[j] = 0;
  return scale + nothing;
}

// quantize_row of this thread's share of `rows` rows, codes from a multiple of four bytes on.
template <class Isa>
void quantize_rows(const Crew& crew, const QLinear& linear, const float* x, int rows, std::uint8_t* codes, float* scales) {
  const std::ptrdiff_t stride = ceil_div(linear.inputs, kQuad) * kQuad;
  for (int r = crew.begin(rows); r < crew.end(rows); ++r) {
    scales[r] = quantize_row<Isa>(linear, x + std::ptrdiff_t{r} * linear.inputs, Isa::kOffset, codes + r * stride);
  }
}

// LayerNorm of a row; `out` may be `x`.
template <class Isa>
void norm_row(const Norm& norm, const float* x, float* out) {
  const int n = norm.size;
  const auto total = [n](const auto& term) {
    auto sum = Isa::set_float(0.0f);
    int i = 0;
    for (; i + Isa::kLanes <= n; i += Isa::kLanes) sum = term(Isa{}, i, sum);
    float whole = Isa::reduce_add_float(sum);
    for (; i < n; ++i) whole = term(FloatPortable{}, i, whole);
    return whole;
  };
  const float mean = total([x](auto isa, int i, auto sum) {
                       using V = decltype(isa);
                       return V::add_float(sum, V::load_float(x + i));
                     }) /
                     static_cast<float>(n);
  const float variance = total([x, mean](auto isa, int i, auto sum) {
                           using V = decltype(isa);
                           const auto centered = V::sub_float(V::load_float(x + i), V::set_float(mean));
                           return V::fused(centered, centered, sum);
                         }) /
                         static_cast<float>(n);
  const float inverse = 1.0f / std::sqrt(variance + norm.eps);
  sweep_float<Isa>(n, [&](auto isa, int i) {
    using V = decltype(isa);
    const auto normal = V::mul_float(V::sub_float(V::load_float(x + i), V::set_float(mean)), V::set_float(inverse));
    V::store_float(out + i, V::fused(normal, V::load_float(norm.weight + i), V::load_float(norm.bias + i)));
  });
}

// x / sqrt(mean(x^2) + eps) * weight, of a row.
template <class Isa>
void rms_norm_row(const RmsNorm& norm, const float* x, float* out) {
  const int n = norm.size;
  auto squares = Isa::set_float(0.0f);
  int i = 0;
  for (; i + Isa::kLanes <= n; i += Isa::kLanes) {
    const auto value = Isa::load_float(x + i);
    squares = Isa::fused(value, value, squares);
  }
  float sum = Isa::reduce_add_float(squares);
  for (; i < n; ++i) sum = std::fma(x[i], x[i], sum);
  const float inverse = 1.0f / std::sqrt(sum / static_cast<float>(n) + norm.eps);
  sweep_float<Isa>(n, [&](auto isa, int j) {
    using V = decltype(isa);
    V::store_float(out + j, V::mul_float(V::load_float(norm.weight + j), V::mul_float(V::load_float(x + j), V::set_float(inverse))));
  });
}

// Rotates a head of `size` (even) channels in place: channel i with channel i + size / 2, by the angles whose cosines and
// sines stand at both. Rounds as the products and the sum alone do.
template <class Isa>
void rotate_head(float* head, const float* cosine, const float* sine, int size) {
  const int half = size / 2;
  sweep_float<Isa>(half, [&](auto isa, int i) {
    using V = decltype(isa);
    const auto low = V::load_float(head + i), high = V::load_float(head + half + i);
    V::store_float(head + i, V::sub_float(V::mul_float(low, V::load_float(cosine + i)), V::mul_float(high, V::load_float(sine + i))));
    V::store_float(head + half + i, V::add_float(V::mul_float(high, V::load_float(cosine + half + i)),
                                                 V::mul_float(low, V::load_float(sine + half + i))));
  });
}

// Weights e^(x - max) of a row of scores, in place, and their sum; `count` is a multiple of kTile.
template <class Isa>
float softmax_row(float* scores, int count) {
  auto top = Isa::load_float(scores);
  for (int i = 0; i < count; i += Isa::kLanes) top = Isa::max_float(top, Isa::load_float(scores + i));
  const auto largest = Isa::set_float(Isa::reduce_max_float(top));
  auto sum = Isa::set_float(0.0f);
  for (int i = 0; i < count; i += Isa::kLanes) {
    const auto weight = exponential<Isa>(Isa::sub_float(Isa::load_float(scores + i), largest));
    Isa::store_float(scores + i, weight);
    sum = Isa::add_float(sum, weight);
  }
  return Isa::reduce_add_float(sum);
}

}  // namespace
}  // namespace qtool
