// The product of a linear layer with float inputs and outputs: codes of rows by int8 or int4 weights, scaled.

#pragma once

#include "float_rows.h"

namespace qtool {
namespace {

// totals += sums * scale of the row * scale of the output, of a block of R rows by P panels, in this order.
template <class Isa, int R, int P>
void add_scaled(const std::int32_t* sums, const float* act_scales, const float* scale, const std::int32_t* row_sums, float* totals) {
  constexpr int kWidth = P * kTile, kVectors = kWidth / Isa::kLanes;
  typename Isa::Float scales[kVectors];
  typename Isa::Int corrections[kVectors];
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) {
    scales[v] = Isa::load_float(scale + v * Isa::kLanes);
    corrections[v] = Isa::mul(Isa::load(row_sums + v * Isa::kLanes), Isa::set(Isa::kOffset));
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const auto act_scale = Isa::set_float(act_scales[r]);
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      const int i = r * kWidth + v * Isa::kLanes;
      const auto sum = Isa::to_float(Isa::sub(Isa::load(sums + i), corrections[v]));
      const auto y = Isa::mul_float(Isa::mul_float(sum, act_scale), scales[v]);
      Isa::store_float(totals + i, Isa::add_float(Isa::load_float(totals + i), y));
    }
  }
}

// The same with `offset`, what code 0 of each output stands for: it is multiplied by the sum of a row's codes.
template <class Isa>
void add_shifted(int rows, int width, const std::int32_t* sums, const float* act_scales, const float* scale, const std::int32_t* row_sums,
                 const float* offset, const std::int32_t* code_sums, std::ptrdiff_t blocks, float* totals) {
  for (int r = 0; r < rows; ++r) {
    const auto act_scale = Isa::set_float(act_scales[r]);
    const auto code_sum = Isa::set_float(static_cast<float>(code_sums[r * blocks]) * act_scales[r]);
    for (int i = 0; i < width; i += Isa::kLanes) {
      const auto correction = Isa::mul(Isa::load(row_sums + i), Isa::set(Isa::kOffset));
      const auto sum = Isa::to_float(Isa::sub(Isa::load(sums + r * width + i), correction));
      auto y = Isa::mul_float(Isa::mul_float(sum, act_scale), Isa::load_float(scale + i));
      y = Isa::add_float(y, Isa::mul_float(code_sum, Isa::load_float(offset + i)));
      Isa::store_float(totals + r * width + i, Isa::add_float(Isa::load_float(totals + r * width + i), y));
    }
  }
}

// Sums of a row's codes, as they are without kOffset, over each block of columns.
template <class Isa>
void add_codes(const QLinear& linear, const std::uint8_t* codes, std::int32_t* sums) {
  for (int block = 0; block < linear.column_blocks; ++block) {
    const int begin = block * linear.width, end = std::min(begin + linear.width, linear.inputs);
    std::int32_t sum = 0;
    for (int k = begin; k < end; ++k) sum += Isa::kOffset != 0 ? codes[k] - Isa::kOffset : static_cast<std::int8_t>(codes[k]);
    sums[block] = sum;
  }
}

// add_scaled by number of rows and panels.
template <class Isa>
struct Scaled {
  using Function = void (*)(const std::int32_t*, const float*, const float*, const std::int32_t*, float*);

  static Function of(int rows, int panels) {
    static constexpr auto table = make(std::make_index_sequence<Isa::kRows * Isa::kPanels>{});
    return table[(rows - 1) * Isa::kPanels + panels - 1];
  }

 private:
  template <std::size_t... I>
  static constexpr std::array<Function, sizeof...(I)> make(std::index_sequence<I...>) {
    return {&add_scaled<Isa, I / Isa::kPanels + 1, I % Isa::kPanels + 1>...};
  }
};

// A product of one thread: rows of codes by some panels of the weights. Nibbles are unpacked a group of panels at a time,
// which then serves all rows as int8 weights do.
template <class Isa>
class FloatProduct {
 public:
  // `codes` are as quantize_row makes them, `stride` bytes a row, with a scale for each row. `unpacked` is this thread's
  // own, of `unpacked_bytes`. Weights with offsets need the sums of each row's codes, [rows][column blocks].
  FloatProduct(const QLinear& linear, const std::uint8_t* codes, const float* scales, int rows, std::int8_t* unpacked,
               const std::int32_t* code_sums = nullptr)
      : linear_(linear), codes_(codes), scales_(scales), code_sums_(code_sums), rows_(rows), steps_(ceil_div(linear.inputs, kQuad)),
        block_steps_(std::min(ceil_div(linear.width, kQuad), steps_)), held_(held(linear, rows)), unpacked_(unpacked) {}

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
      const int column = p * kTile, width = panels * kTile;
      std::fill(totals, totals + rows * width, -0.0f);  // to which adding a number gives its very bits, those of -0 too
      const auto add = Scaled<Isa>::of(rows, panels);
      for (int block = 0; block < linear_.column_blocks; ++block) {
        if (r == 0) fetch_scales(block + kBlocksAhead, p, panels);
        sum_block(r, rows, p, panels, block, sums);
        const Scales scales(linear_, block, column, width);
        if (scales.offset == nullptr) {
          add(sums, scales_ + r, scales.scale, scales.row_sums, totals);
        } else {
          const std::ptrdiff_t blocks = linear_.column_blocks;
          add_shifted<Isa>(rows, width, sums, scales_ + r, scales.scale, scales.row_sums, scales.offset, code_sums_ + r * blocks + block,
                           blocks, totals);
        }
      }
      sweep_float<Isa>(std::min(width, linear_.outputs - column), [&](auto isa, int i) {
        using V = decltype(isa);
        for (int at = 0; at < rows; ++at) {
          const auto y = V::load_float(totals + at * width + i);
          store(isa, target.at(r + at, column + i), linear_.bias == nullptr ? y : V::add_float(y, V::load_float(linear_.bias + column + i)));
        }
      });
    });
  }

 private:
  static constexpr int kTileBytes = kTile * kQuad;
  static constexpr int kCells = Isa::kRows * Isa::kPanels * kTile;
  static constexpr int kMostSteps = 64;     // of nibbles that are unpacked at a time: they stay in the first-level cache
  static constexpr int kBlocksAhead = 8;    // blocks of columns whose scales are asked for
  static constexpr int kBytesAhead = 2048;  // nibbles that are asked for

  // Of a block of columns the scales, sums and offsets of `width` outputs; for those that the matrix does not have, zeros.
  struct Scales {
    Scales(const QLinear& linear, int block, int column, int width)
        : scale(linear.scale + std::ptrdiff_t{block} * linear.outputs + column),
          row_sums(linear.row_sums + std::ptrdiff_t{block} * linear.outputs + column),
          offset(linear.offset == nullptr ? nullptr : linear.offset + std::ptrdiff_t{block} * linear.outputs + column) {
      const int real = linear.outputs - column;
      if (real >= width) return;
      std::fill(std::copy(scale, scale + real, scale_), scale_ + width, 0.0f);
      std::fill(std::copy(row_sums, row_sums + real, sums_), sums_ + width, 0);
      scale = scale_, row_sums = sums_;
      if (offset == nullptr) return;
      std::fill(std::copy(offset, offset + real, offset_), offset_ + width, 0.0f);
      offset = offset_;
    }

    const float* scale;
    const std::int32_t* row_sums;
    const float* offset;

   private:
    alignas(64) float scale_[Isa::kPanels * kTile];
    alignas(64) std::int32_t sums_[Isa::kPanels * kTile];
    alignas(64) float offset_[Isa::kPanels * kTile];
  };

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
    const int begin = block * block_steps_, count = std::min(block_steps_, steps_ - begin), end = begin + count;
    if (!linear_.nibbles) {
      const auto* weight = static_cast<const std::int8_t*>(linear_.weight) + (std::ptrdiff_t{p} * steps_ + begin) * kTileBytes;
      multiply_steps(codes + begin * kQuad, stride, weight, std::ptrdiff_t{steps_} * kTileBytes, count, sums);
      return;
    }
    const std::ptrdiff_t panel = std::ptrdiff_t{held_} * kTileBytes;
    const std::int8_t* weight = unpacked_ + (held_ == steps_ ? begin : 0) * kTileBytes;
    if (r > 0) {
      multiply_steps(codes + begin * kQuad, stride, weight, panel, count, sums);
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
      if (linear_.offset != nullptr) __builtin_prefetch(linear_.offset + cells + c);
    }
  }

  const QLinear& linear_;
  const std::uint8_t* codes_;
  const float* scales_;
  const std::int32_t* code_sums_;
  int rows_, steps_, block_steps_, held_;
  std::int8_t* unpacked_;
};

}  // namespace
}  // namespace qtool
