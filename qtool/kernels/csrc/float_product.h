// The product of a linear layer with float inputs and outputs: codes of rows by int8 or int4 weights, scaled.

#pragma once

#include "float_rows.h"

namespace qtool {
namespace {

// A product of one thread: rows of codes by some panels of the weights. Nibbles are unpacked a group of panels at a time,
// which then serves all rows as int8 weights do.
template <class Isa>
class FloatProduct {
 public:
  // `codes` are as quantize_row makes them, `stride` bytes a row, with a scale for each row. `unpacked` is this thread's
  // own, of `unpacked_bytes`.
  FloatProduct(const QLinear& linear, const std::uint8_t* codes, const float* scales, int rows, std::int8_t* unpacked)
      : linear_(linear), codes_(codes), scales_(scales), rows_(rows), steps_(ceil_div(linear.inputs, kQuad)),
        block_steps_(steps_ / linear.column_blocks), held_(held(linear, rows)), unpacked_(unpacked) {}

  // Bytes a row of codes takes.
  static int stride(const QLinear& linear) { return ceil_div(linear.inputs, kQuad) * kQuad; }
  static int groups(const QLinear& linear) { return ceil_div(ceil_div(linear.outputs, kTile), Isa::kPanels); }
  static std::int64_t unpacked_bytes(const QLinear& linear, int rows) {
    return linear.nibbles ? std::int64_t{Isa::kPanels} * held(linear, rows) * kTileBytes : 0;
  }

  // Calls `store(isa, cell, y)` for what belongs into each cell of `target` [rows][outputs], of groups [begin, end) of panels.
  template <class Store>
  void run(int begin, int end, const Target<float>& target, const Store& store) const {
    const int last = std::min(end * Isa::kPanels, ceil_div(linear_.outputs, kTile));
    const std::ptrdiff_t panel = std::ptrdiff_t{steps_} * (linear_.nibbles ? kTileBytes / 2 : kTileBytes);
    by_blocks<Isa>(rows_, linear_.weight, panel, begin * Isa::kPanels, last, target, [&](int r, int rows, int p, int panels) {
      alignas(64) std::int32_t sums[kCells];
      alignas(64) float totals[kCells];
      const int width = panels * kTile, column = p * kTile;
      for (int block = 0; block < linear_.column_blocks - 1; ++block) {
        sum_block(r, rows, p, panels, block, sums);
        scale_sums(r, rows, block, column, width, sums, [&](auto isa, int, int i, auto y) {
          using V = decltype(isa);
          V::store_float(totals + i, block == 0 ? y : V::add_float(V::load_float(totals + i), y));
        });
      }
      const bool biased = linear_.bias != nullptr, divided = linear_.column_blocks > 1;
      sum_block(r, rows, p, panels, linear_.column_blocks - 1, sums);
      scale_sums(r, rows, linear_.column_blocks - 1, column, width, sums, [&](auto isa, int at, int i, auto y) {
        using V = decltype(isa);
        const int c = column + i - at * width;
        if (divided) y = V::add_float(V::load_float(totals + i), y);
        if (biased) y = V::add_float(y, V::load_float(linear_.bias + c));
        store(isa, target.at(r + at, c), y);
      });
    });
  }

 private:
  static constexpr int kTileBytes = kTile * kQuad;
  static constexpr int kCells = Isa::kRows * Isa::kPanels * kTile;
  static constexpr int kMostSteps = 64;     // of nibbles that are unpacked at a time: they stay in the first-level cache
  static constexpr int kBlocksAhead = 8;    // blocks of columns whose scales are asked for
  static constexpr int kBytesAhead = 2048;  // nibbles that are asked for

  // Steps of a panel that stay unpacked: no more than are multiplied next where no other rows come after these.
  static int held(const QLinear& linear, int rows) {
    const int steps = ceil_div(linear.inputs, kQuad);
    return rows > Isa::kRows ? steps : std::min(steps, kMostSteps);
  }

  // Sums of a block of columns for `rows` rows from row r on, int32 [rows][panels * 16].
  void sum_block(int r, int rows, int p, int panels, int block, std::int32_t* sums) const {
    const auto multiply_steps = Tiles<Isa>::of(rows, panels);
    const std::ptrdiff_t stride = std::ptrdiff_t{steps_} * kQuad;
    const std::uint8_t* codes = codes_ + r * stride;
    const int begin = block * block_steps_, end = begin + block_steps_;
    if (r == 0) fetch_scales(block + kBlocksAhead, p, panels);
    if (!linear_.nibbles) {
      const auto* weight = static_cast<const std::int8_t*>(linear_.weight) + (std::ptrdiff_t{p} * steps_ + begin) * kTileBytes;
      multiply_steps(codes + begin * kQuad, stride, weight, std::ptrdiff_t{steps_} * kTileBytes, block_steps_, sums);
      return;
    }
    const std::ptrdiff_t panel = std::ptrdiff_t{held_} * kTileBytes;
    const std::int8_t* weight = unpacked_ + (held_ == steps_ ? begin : 0) * kTileBytes;
    if (r > 0) {
      multiply_steps(codes + begin * kQuad, stride, weight, panel, block_steps_, sums);
      return;
    }
    // While the first rows are multiplied, a stretch at a time; longer blocks than that are added up as integers.
    alignas(64) std::int32_t part[kCells];
    for (int from = begin; from < end; from += kMostSteps) {
      const int some = std::min(kMostSteps, end - from), to = held_ == steps_ ? from : 0;
      unpack(p, panels, from, some, to);
      std::int32_t* target = from == begin ? sums : part;
      multiply_steps(codes + from * kQuad, stride, unpacked_ + to * kTileBytes, panel, some, target);
      if (from == begin) continue;
      for (int i = 0; i < rows * panels * kTile; ++i) sums[i] += part[i];
    }
  }

  // Unpacks `some` steps of some panels, to step `to` of what is held.
  void unpack(int p, int panels, int from, int some, int to) const {
    constexpr int kBytes = kTileBytes / 2;
    for (int i = 0; i < panels; ++i) {
      const auto* tiles = static_cast<const std::uint8_t*>(linear_.weight) + (std::ptrdiff_t{p + i} * steps_ + from) * kBytes;
      std::int8_t* codes = unpacked_ + (std::ptrdiff_t{i} * held_ + to) * kTileBytes;
      for (int t = 0; t < some; ++t) {
        if (t % 2 == 0) __builtin_prefetch(tiles + t * kBytes + kBytesAhead, 0, 0);
        Isa::unpack(tiles + t * kBytes, codes + t * kTileBytes);
      }
    }
  }

  // Asks for the scales and sums of a block of columns. They lie a row of outputs apart, where no hardware expects them.
  QTOOL_INLINE void fetch_scales(int block, int p, int panels) const {
    if (block >= linear_.column_blocks) return;
    const std::ptrdiff_t cells = std::ptrdiff_t{block} * linear_.outputs;
    for (int c = p * kTile; c < std::min((p + panels) * kTile, linear_.outputs); c += kTile) {
      __builtin_prefetch(linear_.scale + cells + c);
      if (Isa::kOffset != 0) __builtin_prefetch(linear_.row_sums + cells + c);
    }
  }

  // Calls `done(isa, at, i, y)` with sums * scale of the row * scale of the output, cell i of `sums`, of row r + at.
  template <class Done>
  void scale_sums(int r, int rows, int block, int column, int width, const std::int32_t* sums, const Done& done) const {
    sweep_float<Isa>(std::min(width, linear_.outputs - column), [&](auto isa, int i) {
      using V = decltype(isa);
      const std::ptrdiff_t cell = std::ptrdiff_t{block} * linear_.outputs + column + i;
      const auto correction = V::mul(V::load(linear_.row_sums + cell), V::set(Isa::kOffset));
      const auto scale = V::load_float(linear_.scale + cell);
      for (int at = 0; at < rows; ++at) {
        const auto total = V::sub(V::load(sums + at * width + i), correction);
        done(isa, at, at * width + i, V::mul_float(V::mul_float(V::to_float(total), V::set_float(scales_[r + at])), scale));
      }
    });
  }

  const QLinear& linear_;
  const std::uint8_t* codes_;
  const float* scales_;
  int rows_, steps_, block_steps_, held_;
  std::int8_t* unpacked_;
};

}  // namespace
}  // namespace qtool
