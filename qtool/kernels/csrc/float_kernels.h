// The table of float kernels of one instruction set.

#pragma once

#include "code_attention.h"
#include "float_encoder.h"

namespace qtool {
namespace {

template <class Isa>
struct FloatTable {
  static constexpr int kMostSteps = 64;  // of nibbles that are unpacked at a time: they stay in the first-level cache
  static constexpr int kBlocksAhead = 8;    // blocks of columns whose scales are asked for
  static constexpr int kBytesAhead = 2048;  // nibbles that are asked for

  static std::int64_t linear_bytes(const QLinear& linear, int rows, int threads) {
    Cutter cutter(nullptr);
    cut(linear, rows, threads, cutter);
    return cutter.used();
  }

  static void linear(const QLinear& linear, const float* x, int rows, float* out, int threads, void* memory) {
    Cutter cutter(memory);
    const Parts parts = cut(linear, rows, threads, cutter);
    const int stride = ceil_div(linear.inputs, kQuad) * kQuad, panels = ceil_div(linear.outputs, kTile);
    const int groups = ceil_div(panels, Isa::kPanels);
    auto job = [&](const Crew& crew) {
      for (int r = crew.begin(rows); r < crew.end(rows); ++r) {
        parts.scales[r] = quantize_row<Isa>(linear, x + std::int64_t{r} * linear.inputs, Isa::kOffset, parts.codes + std::int64_t{r} * stride);
      }
      crew.wait();
      for (int g = crew.begin(groups); g < crew.end(groups); ++g) {
        const int first = g * Isa::kPanels, last = std::min(first + Isa::kPanels, panels);
        for (int block = 0; block < linear.column_blocks; ++block) {
          fetch_scales(linear, block + kBlocksAhead, first, last);
          column_block(linear, parts, block, first, last, rows, out, parts.unpacked + crew.index * kUnpacked);
        }
        if (linear.bias != nullptr && linear.column_blocks > 1) add_bias(linear, first, last, rows, out);
      }
    };
    together(threads, job);
  }

  static std::int64_t encoder_bytes(const QEncoder& encoder, const std::int32_t* starts, int sequences, int threads) {
    return FloatEncoder<Isa>::bytes(encoder, starts, sequences, threads);
  }

  static void encoder(const QEncoder& encoder, float* x, const std::int32_t* starts, int sequences, int threads, void* memory) {
    FloatEncoder<Isa> work(encoder, x, starts, sequences, threads, memory);
    auto job = [&](const Crew& crew) { work.run(crew); };
    together(threads, job);
  }

  static constexpr FloatKernels table() { return {&linear_bytes, &linear, &encoder_bytes, &encoder, &CodeAttention<Isa>::bytes, &CodeAttention<Isa>::run}; }

 private:
  static constexpr int kUnpacked = Isa::kPanels * kMostSteps * 64;

  struct Parts {
    std::uint8_t* codes;
    float* scales;
    std::int8_t* unpacked;
  };

  static Parts cut(const QLinear& linear, int rows, int threads, Cutter& cutter) {
    Parts parts;
    parts.codes = cutter.take<std::uint8_t>(std::int64_t{rows} * ceil_div(linear.inputs, kQuad) * kQuad);
    parts.scales = cutter.take<float>(rows);
    parts.unpacked = cutter.take<std::int8_t>(linear.nibbles ? std::int64_t{threads} * kUnpacked : 0);
    return parts;
  }

  // Asks for the scales and sums of a block of columns. They lie a row of outputs apart, where no hardware expects them.
  static QTOOL_INLINE void fetch_scales(const QLinear& linear, int block, int first, int last) {
    if (block >= linear.column_blocks) return;
    const std::ptrdiff_t cells = std::ptrdiff_t{block} * linear.outputs;
    for (int c = first * kTile; c < std::min(last * kTile, linear.outputs); c += kTile) {
      __builtin_prefetch(linear.scale + cells + c);
      __builtin_prefetch(linear.row_sums + cells + c);
    }
  }

  // Adds the product of one block of columns with panels [first, last) to `out` (or starts it).
  static void column_block(const QLinear& linear, const Parts& parts, int block, int first, int last, int rows, float* out,
                           std::int8_t* unpacked) {
    const int all = ceil_div(linear.inputs, kQuad), stride = all * kQuad;
    const int begin = block * (all / linear.column_blocks), steps = linear.column_blocks == 1 ? all : all / linear.column_blocks;
    const auto done = [&](int first_row, int count, int column, const std::int32_t* sums, int width) {
      float* matrix = out + std::int64_t{first_row} * linear.outputs;
      finish_sums<Isa>(linear, parts.scales + first_row, count, block, column, sums, width, [&](auto isa, int r, int c, auto y) {
        using V = decltype(isa);
        float* cell = matrix + std::int64_t{r} * linear.outputs + c;
        V::store_float(cell, block == 0 ? y : V::add_float(V::load_float(cell), y));
      });
    };
    const std::uint8_t* codes = parts.codes + begin * kQuad;
    if (!linear.nibbles) {
      multiply<Isa>(codes, stride, rows, static_cast<const std::int8_t*>(linear.weight) + begin * 64, std::ptrdiff_t{all} * 64, steps,
                    first, last, Target<float>{out, linear.outputs}, done);
      return;
    }
    multiply_nibbles(linear, codes, stride, rows, begin, steps, first, last, unpacked, done);
  }

  // As `multiply`, of weights that are unpacked a stretch at a time. Longer blocks than a stretch are added up as integers.
  template <class Done>
  static void multiply_nibbles(const QLinear& linear, const std::uint8_t* codes, int stride, int rows, int begin, int steps, int first,
                               int last, std::int8_t* unpacked, const Done& done) {
    const int all = ceil_div(linear.inputs, kQuad), panels = last - first;
    const auto* weight = static_cast<const std::uint8_t*>(linear.weight);
    alignas(64) std::int32_t sums[Isa::kRows * Isa::kPanels * kTile], part[Isa::kRows * Isa::kPanels * kTile];
    for (int r = 0; r < rows; r += Isa::kRows) {
      const int count = std::min(Isa::kRows, rows - r);
      for (int from = 0; from < steps; from += kMostSteps) {
        const int some = std::min(kMostSteps, steps - from);
        if (r == 0 || steps > kMostSteps) {
          for (int p = 0; p < panels; ++p) {
            const std::uint8_t* tiles = weight + (std::ptrdiff_t{first + p} * all + begin + from) * 32;
            for (int t = 0; t < some; ++t) {
              if (t % 2 == 0) __builtin_prefetch(tiles + t * 32 + kBytesAhead, 0, 0);
              Isa::unpack(tiles + t * 32, unpacked + (p * kMostSteps + t) * 64);
            }
          }
        }
        std::int32_t* target = from == 0 ? sums : part;
        Tiles<Isa>::of(count, panels)(codes + std::int64_t{r} * stride + from * kQuad, stride, unpacked, kMostSteps * 64, some, target);
        if (from == 0) continue;
        for (int i = 0; i < count * panels * kTile; ++i) sums[i] += part[i];
      }
      done(r, count, first * kTile, sums, panels * kTile);
    }
  }

  static void add_bias(const QLinear& linear, int first, int last, int rows, float* out) {
    const int column = first * kTile, count = std::min(last * kTile, linear.outputs) - column;
    for (int r = 0; r < rows; ++r) {
      float* row = out + std::int64_t{r} * linear.outputs + column;
      sweep_float<Isa>(count, [&](auto isa, int c) {
        using V = decltype(isa);
        V::store_float(row + c, V::add_float(V::load_float(row + c), V::load_float(linear.bias + column + c)));
      });
    }
  }
};

}  // namespace
}  // namespace qtool
