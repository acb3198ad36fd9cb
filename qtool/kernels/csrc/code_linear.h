// Rows of floats by integer weights: the codes are widened on their way, never kept as floats.
//
// With few rows each code is used as soon as it is read, and memory sets the pace. With many, a panel of weights is
// unpacked once, scales and offsets included, and multiplied by all rows.

#pragma once

#include "float_attention.h"

namespace qtool {
namespace {

template <class Isa>
class CodeProduct {
 public:
  static constexpr int kFew = 2;  // rows for which codes are not unpacked

  // Of `total` rows that are multiplied at all, `rows` from x on; sums are the same whatever part of the total they are.
  // `own` is this thread's, of `room` floats.
  CodeProduct(const CodeLinear& linear, const float* x, int rows, int total, float* own)
      : linear_(linear), x_(x), rows_(rows), is_few_(total <= kFew), own_(own) {}

  // Floats that a thread needs: sums of x by row and block, or unpacked panels.
  static std::int64_t room(const CodeLinear& linear, int total) {
    if (linear.layout == kCodeRows) return 0;
    if (total <= kFew) return ceil_div(total * linear.column_blocks, kTile) * kTile;
    return std::int64_t{Isa::kFloatPanels} * ceil_div(linear.inputs, kQuad) * kQuad * kTile;
  }

  // Calls `store(isa, cell, y)` for what belongs into each cell of `target` [rows][outputs], of this thread's outputs.
  template <class Store>
  void run(const Crew& crew, const Target<float>& target, const Store& store) const {
    if (linear_.layout == kCodeRows) {
      const int groups = ceil_div(linear_.outputs, kTogether);
      for (int g = crew.begin(groups); g < crew.end(groups); ++g) table_rows(g * kTogether, target, store);
      return;
    }
    const int panels = ceil_div(linear_.outputs, kTile);
    if (!is_few_) {
      const int groups = ceil_div(panels, Isa::kFloatPanels);
      for (int g = crew.begin(groups); g < crew.end(groups); ++g) {
        const int first = g * Isa::kFloatPanels;
        many(first, std::min(Isa::kFloatPanels, panels - first), target, store);
      }
      return;
    }
    if (linear_.offset != nullptr && crew.begin(panels) < crew.end(panels)) add_up(own_);
    for (int p = crew.begin(panels); p < crew.end(panels); ++p) {
      linear_.layout == kCodeNibbles ? few<true>(p, target, store) : few<false>(p, target, store);
    }
  }

 private:
  static constexpr int kTogether = 4;  // rows of a table that share what is loaded of x
  static constexpr int kBytesAhead = 4096;  // of a table that are asked for
  static constexpr int kVectors = kTile / Isa::kLanes;
  using Float = typename Isa::Float;

  int block_end(int block) const { return std::min((block + 1) * linear_.width, linear_.inputs); }

  // Sums of each row of x over each block, [rows][column blocks].
  void add_up(float* sums) const {
    for (int r = 0; r < rows_; ++r) {
      const float* x = x_ + std::int64_t{r} * linear_.inputs;
      for (int block = 0; block < linear_.column_blocks; ++block) {
        int k = block * linear_.width;
        const int end = block_end(block);
        auto lanes = Isa::set_float(0.0f);
        for (; k + Isa::kLanes <= end; k += Isa::kLanes) lanes = Isa::add_float(lanes, Isa::load_float(x + k));
        float sum = Isa::reduce_add_float(lanes);
        for (; k < end; ++k) sum += x[k];
        sums[r * linear_.column_blocks + block] = sum;
      }
    }
  }

  // Where numbers of blocks lie for the outputs of a panel; behind the last output those of the last.
  struct Places {
    Places(const CodeLinear& linear, int panel) {
      for (int c = 0; c < kTile; ++c) {
        const int output = std::min(panel * kTile + c, linear.outputs - 1);
        cells[c] = std::int64_t{output / linear.block_rows} * linear.column_blocks;
      }
    }
    void gather(const float* values, int block, float* out) const {
      for (int c = 0; c < kTile; ++c) out[c] = values[cells[c] + block];
    }
    std::int64_t cells[kTile];
  };

  template <bool kNibbles>
  const std::uint8_t* tiles(int panel) const {
    const std::ptrdiff_t steps = ceil_div(linear_.inputs, kQuad);
    return static_cast<const std::uint8_t*>(linear_.weight) + panel * steps * (kNibbles ? kTile * kQuad / 2 : kTile * kQuad);
  }

  template <bool kNibbles>
  static typename Isa::Int raw(const std::uint8_t* tile, int vector) {
    if constexpr (kNibbles) return Isa::load_pairs(tile + vector * Isa::kLanes * 2);
    return Isa::load_quads(tile + vector * Isa::kLanes * 4);
  }

  template <bool kNibbles, class Store>
  void few(int panel, const Target<float>& target, const Store& store) const {
    constexpr int kBytes = kNibbles ? kTile * kQuad / 2 : kTile * kQuad;
    alignas(64) float scale[kTile], offset[kTile], result[kTile];
    const Places places(linear_, panel);
    for (int r = 0; r < rows_; ++r) {
      const float* x = x_ + std::int64_t{r} * linear_.inputs;
      const std::uint8_t* tile = tiles<kNibbles>(panel);
      Float total[kVectors];
      for (int v = 0; v < kVectors; ++v) total[v] = Isa::set_float(0.0f);
      for (int block = 0; block < linear_.column_blocks; ++block) {
        const int end = block_end(block);
        Float sums[kQuad][kVectors];
#pragma GCC unroll 4
        for (int i = 0; i < kQuad; ++i) {
#pragma GCC unroll 16
          for (int v = 0; v < kVectors; ++v) sums[i][v] = Isa::set_float(0.0f);
        }
        int k = block * linear_.width;
        for (; k + kQuad <= end; k += kQuad, tile += kBytes) {
          if (!kNibbles || k % (2 * kQuad) == 0) __builtin_prefetch(tile + kBytesAhead, 0, 0);
          step<kNibbles>(tile, x + k, sums);
        }
        if (k < end) {
          float last[kQuad] = {};
          for (int i = 0; k + i < end; ++i) last[i] = x[k + i];
          step<kNibbles>(tile, last, sums);
        }
        places.gather(linear_.scale, block, scale);
        if (linear_.offset != nullptr) places.gather(linear_.offset, block, offset);
        for (int v = 0; v < kVectors; ++v) {
          const auto sum = Isa::add_float(Isa::add_float(sums[0][v], sums[1][v]), Isa::add_float(sums[2][v], sums[3][v]));
          total[v] = Isa::fused(sum, Isa::load_float(scale + v * Isa::kLanes), total[v]);
          if (linear_.offset == nullptr) continue;
          const auto x_sum = Isa::set_float(own_[r * linear_.column_blocks + block]);
          total[v] = Isa::fused(x_sum, Isa::load_float(offset + v * Isa::kLanes), total[v]);
        }
      }
      for (int v = 0; v < kVectors; ++v) Isa::store_float(result + v * Isa::kLanes, total[v]);
      put(r, panel * kTile, result, kTile, target, store);
    }
  }

  // Adds the products of four inputs with a tile.
  template <bool kNibbles>
  static QTOOL_INLINE void step(const std::uint8_t* tile, const float* x, Float (&sums)[kQuad][kVectors]) {
    const auto x0 = Isa::set_float(x[0]), x1 = Isa::set_float(x[1]), x2 = Isa::set_float(x[2]), x3 = Isa::set_float(x[3]);
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      const auto codes = raw<kNibbles>(tile, v);
      sums[0][v] = Isa::fused(x0, Isa::template code<0, kNibbles>(codes), sums[0][v]);
      sums[1][v] = Isa::fused(x1, Isa::template code<1, kNibbles>(codes), sums[1][v]);
      sums[2][v] = Isa::fused(x2, Isa::template code<2, kNibbles>(codes), sums[2][v]);
      sums[3][v] = Isa::fused(x3, Isa::template code<3, kNibbles>(codes), sums[3][v]);
    }
  }

  template <class Store>
  void put(int row, int column, const float* result, int width, const Target<float>& target, const Store& store) const {
    sweep_float<Isa>(std::min(width, linear_.outputs - column), [&](auto isa, int i) {
      using V = decltype(isa);
      auto y = V::load_float(result + i);
      if (linear_.bias != nullptr) y = V::add_float(y, V::load_float(linear_.bias + column + i));
      store(isa, target.at(row, column + i), y);
    });
  }

  template <class Store>
  void many(int first, int panels, const Target<float>& target, const Store& store) const {
    const std::ptrdiff_t size = std::ptrdiff_t{ceil_div(linear_.inputs, kQuad)} * kQuad * kTile;
    for (int p = 0; p < panels; ++p) {
      linear_.layout == kCodeNibbles ? unpack<true>(first + p, own_ + p * size) : unpack<false>(first + p, own_ + p * size);
    }
    for (int r = 0; r < rows_; r += Isa::kFloatRows) {
      const int count = std::min(Isa::kFloatRows, rows_ - r);
      multiply_floats<Isa>(x_ + std::int64_t{r} * linear_.inputs, linear_.inputs, count, own_, size, linear_.inputs, panels,
                           [&](int i, int column, const float* sums, int width) {
                             put(r + i, first * kTile + column, sums, width, target, store);
                           });
    }
  }

  // The weights of a panel as floats, [inputs][16].
  template <bool kNibbles>
  void unpack(int panel, float* out) const {
    constexpr int kBytes = kNibbles ? kTile * kQuad / 2 : kTile * kQuad;
    alignas(64) float scale[kTile], offset[kTile] = {};
    const std::uint8_t* tile = tiles<kNibbles>(panel);
    const Places places(linear_, panel);
    for (int block = 0; block < linear_.column_blocks; ++block) {
      places.gather(linear_.scale, block, scale);
      if (linear_.offset != nullptr) places.gather(linear_.offset, block, offset);
      for (int k = block * linear_.width; k < block_end(block); k += kQuad, tile += kBytes) {
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) {
          const auto codes = raw<kNibbles>(tile, v);
          const auto factor = Isa::load_float(scale + v * Isa::kLanes), zero = Isa::load_float(offset + v * Isa::kLanes);
          float* cell = out + std::ptrdiff_t{k} * kTile + v * Isa::kLanes;
          Isa::store_float(cell, Isa::fused(Isa::template code<0, kNibbles>(codes), factor, zero));
          Isa::store_float(cell + kTile, Isa::fused(Isa::template code<1, kNibbles>(codes), factor, zero));
          Isa::store_float(cell + 2 * kTile, Isa::fused(Isa::template code<2, kNibbles>(codes), factor, zero));
          Isa::store_float(cell + 3 * kTile, Isa::fused(Isa::template code<3, kNibbles>(codes), factor, zero));
        }
      }
    }
  }

  // Some rows of a table of int8 codes, row after row, with one scale a row.
  template <class Store>
  void table_rows(int first, const Target<float>& target, const Store& store) const {
    const int count = std::min(kTogether, linear_.outputs - first);
    const auto* codes = static_cast<const std::int8_t*>(linear_.weight) + std::int64_t{first} * linear_.inputs;
    for (int r = 0; r < rows_; ++r) {
      const float* x = x_ + std::int64_t{r} * linear_.inputs;
      float sums[kTogether] = {};
      if (count == kTogether) {
        table_products<kTogether>(codes, x, sums);
      } else {
        for (int i = 0; i < count; ++i) table_products<1>(codes + std::int64_t{i} * linear_.inputs, x, sums + i);
      }
      for (int i = 0; i < count; ++i) {
        const int output = first + i;
        const float y = sums[i] * linear_.scale[output / linear_.block_rows];
        store(FloatPortable{}, target.at(r, output), linear_.bias != nullptr ? y + linear_.bias[output] : y);
      }
    }
  }

  // Products of x with `N` rows of codes.
  template <int N>
  void table_products(const std::int8_t* codes, const float* x, float* sums) const {
    const int n = linear_.inputs;
    Float first[N], second[N];  // twice, or each sum would wait for the one before
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) first[i] = second[i] = Isa::set_float(0.0f);
    int k = 0;
    for (; k + 2 * Isa::kLanes <= n; k += 2 * Isa::kLanes) {
      const auto x0 = Isa::load_float(x + k), x1 = Isa::load_float(x + k + Isa::kLanes);
      // N rows are read at once, of which the hardware sees no stream: what comes next is asked for line by line.
      for (int byte = 0; byte < 2 * N * Isa::kLanes; byte += 64) __builtin_prefetch(codes + std::int64_t{N} * k + byte + kBytesAhead, 0, 0);
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) {
        const std::int8_t* row = codes + std::int64_t{i} * n + k;
        first[i] = Isa::fused(x0, Isa::to_float(Isa::load(row)), first[i]);
        second[i] = Isa::fused(x1, Isa::to_float(Isa::load(row + Isa::kLanes)), second[i]);
      }
    }
    for (int i = 0; i < N; ++i) {
      sums[i] = Isa::reduce_add_float(Isa::add_float(first[i], second[i]));
      for (int j = k; j < n; ++j) sums[i] = std::fma(x[j], static_cast<float>(codes[std::int64_t{i} * n + j]), sums[i]);
    }
  }

  const CodeLinear& linear_;
  const float* x_;
  int rows_;
  bool is_few_;
  float* own_;
};

}  // namespace
}  // namespace qtool
