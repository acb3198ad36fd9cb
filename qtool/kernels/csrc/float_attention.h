// Attention of one head over the keys of one sequence, in single precision.

#pragma once

#include "float_rows.h"
#include "schedule.h"

namespace qtool {
namespace {

// out[r][16 p + c] = sum over k of a[r][k] * b[p][k][c], in the order of k whatever R and P are.
template <class Isa, int R, int P>
void float_tile(const float* a, std::ptrdiff_t stride, const float* b, std::ptrdiff_t panel, int steps, float* out) {
  constexpr int kVectors = kTile / Isa::kLanes;
  typename Isa::Float sums[R][P * kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < P * kVectors; ++v) sums[r][v] = Isa::set_float(0.0f);
  }
  for (int k = 0; k < steps; ++k) {
    typename Isa::Float row[P * kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < P * kVectors; ++v) {
      row[v] = Isa::load_float(b + (v / kVectors) * panel + k * kTile + (v % kVectors) * Isa::kLanes);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const auto factor = Isa::set_float(a[r * stride + k]);
#pragma GCC unroll 16
      for (int v = 0; v < P * kVectors; ++v) sums[r][v] = Isa::fused(factor, row[v], sums[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < P * kVectors; ++v) Isa::store_float(out + r * P * kTile + v * Isa::kLanes, sums[r][v]);
  }
}

template <class Isa, std::size_t... I>
constexpr auto float_tiles(std::index_sequence<I...>) {
  using Function = void (*)(const float*, std::ptrdiff_t, const float*, std::ptrdiff_t, int, float*);
  return std::array<Function, sizeof...(I)>{&float_tile<Isa, I / Isa::kFloatPanels + 1, I % Isa::kFloatPanels + 1>...};
}

// As `multiply`, of at most kFloatRows rows of floats.
template <class Isa, class Done>
void multiply_floats(const float* a, std::ptrdiff_t stride, int rows, const float* b, std::ptrdiff_t panel, int steps, int panels,
                     const Done& done) {
  static constexpr auto kTiles = float_tiles<Isa>(std::make_index_sequence<Isa::kFloatRows * Isa::kFloatPanels>{});
  alignas(64) float sums[Isa::kFloatRows * Isa::kFloatPanels * kTile];
  for (int p = 0; p < panels; p += Isa::kFloatPanels) {
    const int some = std::min(Isa::kFloatPanels, panels - p);
    kTiles[(rows - 1) * Isa::kFloatPanels + some - 1](a, stride, b + p * panel, panel, steps, sums);
    for (int r = 0; r < rows; ++r) done(r, p * kTile, sums + r * some * kTile, some * kTile);
  }
}

template <class Isa>
class FloatHead {
 public:
  static constexpr int kRows = Isa::kFloatRows;

  FloatHead(int size, int keys, Cutter& cutter) : size_(size), panels_(ceil_div(size, kTile)) {
    const std::int64_t padded = ceil_div(keys, kTile) * kTile;
    keys_ = cutter.take<float>(padded * size);
    values_ = cutter.take<float>(padded * panels_ * kTile);
    scores_ = cutter.take<float>(padded * kRows);
  }

  // Copies the keys and values of one head, `stride` floats apart, in the order in which they are multiplied.
  void pack(const float* key, const float* value, std::ptrdiff_t stride, int keys) {
    count_ = keys, padded_ = ceil_div(keys, kTile) * kTile;
    for (int j = 0; j < padded_; ++j) {
      float* packed = keys_ + std::ptrdiff_t{j / kTile} * kTile * size_ + j % kTile;
      for (int c = 0; c < size_; ++c) packed[c * kTile] = j < keys ? key[j * stride + c] : 0.0f;
    }
    for (int p = 0; p < panels_; ++p) {
      const int width = std::min(kTile, size_ - p * kTile);
      for (int j = 0; j < keys; ++j) {
        float* packed = values_ + (std::ptrdiff_t{p} * padded_ + j) * kTile;
        for (int c = 0; c < kTile; ++c) packed[c] = c < width ? value[j * stride + p * kTile + c] : 0.0f;
      }
    }
  }

  // Context of `count` query rows, at most kRows; rows are `stride` floats apart.
  void attend(const float* query, std::ptrdiff_t stride, int count, float* out) {
    const float unit = 1.0f / std::sqrt(static_cast<float>(size_));
    multiply_floats<Isa>(query, stride, count, keys_, std::ptrdiff_t{kTile} * size_, size_, padded_ / kTile,
                         [&](int r, int column, const float* sums, int columns) {
                           float* row = scores_ + r * padded_ + column;
                           for (int i = 0; i < columns; i += Isa::kLanes) {
                             Isa::store_float(row + i, Isa::mul_float(Isa::load_float(sums + i), Isa::set_float(unit)));
                           }
                         });
    float inverse[kRows];
    for (int r = 0; r < count; ++r) {
      float* row = scores_ + r * padded_;
      for (int j = count_; j < padded_; ++j) row[j] = -INFINITY;
      float sum = softmax_row<Isa>(row, padded_);
      for (int j = count_; j < padded_; ++j) row[j] = 0.0f;
      inverse[r] = 1.0f / sum;
    }
    multiply_floats<Isa>(scores_, padded_, count, values_, std::ptrdiff_t{kTile} * padded_, count_, panels_,
                         [&](int r, int column, const float* sums, int columns) {
                           sweep_float<Isa>(std::min(columns, size_ - column), [&](auto isa, int i) {
                             using V = decltype(isa);
                             V::store_float(out + r * stride + column + i,
                                            V::mul_float(V::load_float(sums + i), V::set_float(inverse[r])));
                           });
                         });
  }

 private:
  int size_, panels_, count_ = 0, padded_ = 0;
  float *keys_, *values_, *scores_;
};

}  // namespace
}  // namespace qtool
