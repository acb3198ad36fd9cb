// The table of integer kernels of one instruction set.

#pragma once

#include <algorithm>

#include "integer_encoder.h"

namespace qtool {
namespace {

template <class Isa>
struct Kernels {
  static std::int64_t encoder_bytes(const IntEncoder& encoder, const IntBatch& batch, int threads) {
    return Encoder<Isa>::bytes(encoder, batch, threads);
  }

  static void encoder(const IntEncoder& encoder, const IntBatch& batch, std::int32_t* out, int threads, void* memory) {
    Encoder<Isa> work(encoder, batch, out, threads, memory);
    auto job = [&](const Crew& crew) { work.run(crew); };
    together(threads, job);
  }

  static void quantize_rows(const std::int32_t* x, int rows, int width, bool is_unsigned, std::int8_t* codes, std::int64_t* amax,
                            int threads) {
    auto job = [&](const Crew& crew) {
      for (int r = crew.begin(rows); r < crew.end(rows); ++r) {
        const std::int64_t cell = std::int64_t{r} * width;
        amax[r] = quantize_row<Isa>(x + cell, width, is_unsigned, 0, reinterpret_cast<std::uint8_t*>(codes) + cell);
      }
    };
    together(threads, job);
  }

  static std::int64_t linear_bytes(const IntLinear& linear, int rows) {
    Cutter cutter(nullptr);
    cutter.take<std::uint8_t>(std::int64_t{rows} * ceil_div(linear.inputs, kQuad) * kQuad);
    cutter.take<std::int32_t>(rows);
    return cutter.used();
  }

  static void linear(const IntLinear& linear, const std::int8_t* codes, const std::int64_t* amax, int rows, std::int32_t* out,
                     int threads, void* memory) {
    const int n = linear.inputs, steps = ceil_div(n, kQuad), stride = steps * kQuad;
    const int panels = ceil_div(linear.outputs, kTile), groups = ceil_div(panels, Isa::kPanels);
    Cutter cutter(memory);
    auto* moved = cutter.take<std::uint8_t>(std::int64_t{rows} * stride);
    auto* scales = cutter.take<std::int32_t>(rows);
    auto job = [&](const Crew& crew) {
      for (int r = crew.begin(rows); r < crew.end(rows); ++r) {
        std::uint8_t* row = moved + std::int64_t{r} * stride;
        for (int i = 0; i < n; ++i) row[i] = static_cast<std::uint8_t>(codes[std::int64_t{r} * n + i] + Isa::kOffset);
        for (int i = n; i < stride; ++i) row[i] = 0;
        scales[r] = amax == nullptr ? 1 : static_cast<std::int32_t>(amax[r]);
      }
      crew.wait();
      multiply<Isa>(moved, stride, rows, linear.weight, std::ptrdiff_t{steps} * 64, steps, crew.begin(groups) * Isa::kPanels,
                    std::min(crew.end(groups) * Isa::kPanels, panels), Target<std::int32_t>{out, linear.outputs},
                    [&](int first, int count, int column, const std::int32_t* sums, int width) {
                      finish_sums<Isa>(linear, scales + first, count, column, sums, width, [&](auto isa, int r, int c, auto y) {
                        decltype(isa)::put(out + std::int64_t{first + r} * linear.outputs + c, y);
                      });
                    });
    };
    together(threads, job);
  }

  static void norm(const IntNorm& norm, const std::int32_t* x, int rows, std::int32_t* out, int threads) {
    auto job = [&](const Crew& crew) {
      for (int r = crew.begin(rows); r < crew.end(rows); ++r) {
        norm_row<Isa>(norm, x + std::int64_t{r} * norm.size, out + std::int64_t{r} * norm.size);
      }
    };
    together(threads, job);
  }

  static std::int64_t attention_bytes(const IntAttention& attention, int tokens) {
    Cutter cutter(nullptr);
    Head<Isa>(attention, tokens, cutter);
    return cutter.used();
  }

  // `keys` are the indices of the keys that are attended to, text by text: starts[i] ... starts[i + 1] - 1 of text i.
  static void attention(const IntAttention& attention, const std::int32_t* query, const std::int8_t* key, const std::int8_t* value,
                        const std::int32_t* keys, const std::int32_t* starts, int batch, int tokens, std::int32_t* out,
                        int threads, void* memory) {
    const std::int64_t hidden = std::int64_t{attention.heads} * attention.size, each = attention_bytes(attention, tokens);
    auto job = [&](const Crew& crew) {
      Cutter cutter(static_cast<std::uint8_t*>(memory) + each * crew.index);
      Head<Isa> head(attention, tokens, cutter);
      const int tasks = batch * attention.heads;
      for (int task = crew.begin(tasks); task < crew.end(tasks); ++task) {
        const int text = task / attention.heads, number = task % attention.heads;
        const std::int64_t cell = text * tokens * hidden + std::int64_t{number} * attention.size;
        const std::int32_t* rows = keys + starts[text];
        head.pack(key + cell, value + cell, hidden, starts[text + 1] - starts[text], [rows](int i) { return rows[i]; });
        for (int r = 0; r < tokens; r += Isa::kRows) {
          head.attend(number, query + cell + r * hidden, hidden, std::min(Isa::kRows, tokens - r), out + cell + r * hidden);
        }
      }
    };
    together(threads, job);
  }

  static void product(const std::uint8_t* a, const std::int8_t* w, int rows, int inputs, int outputs, std::int32_t* out) {
    const int steps = ceil_div(inputs, kQuad);
    multiply<Isa>(a, inputs, rows, w, std::ptrdiff_t{steps} * 64, steps, 0, outputs / kTile, Target<std::int32_t>{out, outputs},
                  [&](int first, int count, int column, const std::int32_t* sums, int width) {
                    for (int r = 0; r < count; ++r) {
                      for (int i = 0; i < width; i += Isa::kLanes) {
                        Isa::put(out + std::int64_t{first + r} * outputs + column + i, Isa::load(sums + r * width + i));
                      }
                    }
                  });
  }

  static constexpr IntegerKernels table() {
    return {Isa::kOffset, &encoder_bytes, &encoder, &quantize_rows, &linear_bytes, &linear, &norm, &attention_bytes, &attention, &Isa::spin, Isa::kSpin, &product};
  }
};

}  // namespace
}  // namespace qtool
