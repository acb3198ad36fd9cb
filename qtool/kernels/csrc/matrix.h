// The int8 matrix product: rows of activation codes by weights in tiles of 16 outputs by 4 inputs.

#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "isa_portable.h"

namespace qtool {
namespace {  // compiled for each instruction set apart: no copy may serve another

constexpr int kTile = 16;   // outputs a panel
constexpr int kQuad = 4;    // inputs a step

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

constexpr std::ptrdiff_t kAhead = 64 << 10;

template <class Isa>
struct Tiles {
  using Function = void (*)(const std::uint8_t*, std::ptrdiff_t, const std::int8_t*, std::ptrdiff_t, std::ptrdiff_t, std::int32_t*);

  // Compiled block products by number of rows and panels.
  static Function of(int rows, int panels) {
    static constexpr auto table = make(std::make_index_sequence<Isa::kRows * Isa::kPanels>{});
    return table[(rows - 1) * Isa::kPanels + panels - 1];
  }

 private:
  template <std::size_t... I>
  static constexpr std::array<Function, sizeof...(I)> make(std::index_sequence<I...>) {
    return {&Isa::template tile<I / Isa::kPanels + 1, I % Isa::kPanels + 1>...};
  }
};

// Where results of a product go: rows of T, `stride` elements apart.
template <class T>
struct Target {
  T* first;
  std::ptrdiff_t stride;

  T* at(int r, int c) const { return first + r * stride + c; }
  // Asks for the cache lines of a block of results before they are needed.
  QTOOL_INLINE void fetch(int r, int rows, int c, int width) const {
    for (int i = 0; i < rows; ++i) {
      const auto* cell = reinterpret_cast<const char*>(at(r + i, c));
      for (std::ptrdiff_t byte = 0; byte < static_cast<std::ptrdiff_t>(width * sizeof(T)); byte += 64) __builtin_prefetch(cell + byte, 1, 3);
    }
  }
};

// A place that needs no asking for.
struct Near {
  void fetch(int, int, int, int) const {}
};

// Calls `body(row, count, panel, panels)` for blocks of `rows` rows by panels [begin, end) of weights, of which one starts
// `panel` bytes behind the one before, in the order in which weights stay in the cache. What `target` says of a block is
// fetched beforehand.
template <class Isa, class Where, class Body>
void by_blocks(int rows, const void* weights, std::ptrdiff_t panel, int begin, int end, const Where& target, const Body& body) {
  if (rows == 0) return;
  for (int p = begin; p < end; p += Isa::kPanels) {
    const int panels = std::min(Isa::kPanels, end - p);
    // Short panels are over before the hardware has seen a stream: the next ones are asked for early, a part a block. For
    // one block of rows all weights are a stream, and asking for a panel at once would only hold it up.
    const bool streams = rows <= Isa::kRows || panels * panel > kAhead;
    const std::ptrdiff_t ahead = !streams && p + 2 * Isa::kPanels <= end ? panels * panel : 0;
    const std::ptrdiff_t share = ceil_div(static_cast<int>(ahead), ceil_div(rows, Isa::kRows));
    for (int r = 0; r < rows; r += Isa::kRows) {
      const int block = std::min(Isa::kRows, rows - r);
      const auto* next = static_cast<const std::int8_t*>(weights) + (p + panels) * panel + r / Isa::kRows * share;
      for (std::ptrdiff_t i = 0; i < share; i += 64) __builtin_prefetch(next + i, 0, 2);
      target.fetch(r, block, p * kTile, panels * kTile);
      body(r, block, p, panels);
    }
  }
}

// Products of `rows` rows of `a`, `stride` bytes apart, with panels [begin, end) of `w`; a panel has `steps` tiles and
// starts `panel` bytes behind the one before. `done(row, count, column, sums, width)` gets int32 sums [count][width] of some
// rows and outputs; `width` is a multiple of 16. For `target` see by_blocks.
template <class Isa, class Where, class Done>
void multiply(const std::uint8_t* a, std::ptrdiff_t stride, int rows, const std::int8_t* w, std::ptrdiff_t panel, int steps, int begin,
              int end, const Where& target, const Done& done) {
  alignas(64) std::int32_t sums[Isa::kRows * Isa::kPanels * kTile];
  by_blocks<Isa>(rows, w, panel, begin, end, target, [&](int r, int block, int p, int panels) {
    Tiles<Isa>::of(block, panels)(a + r * stride, stride, w + p * panel, panel, steps, sums);
    done(r, block, p * kTile, sums, panels * kTile);
  });
}

// Calls `body(isa, i)` for i = 0, kLanes, 2 kLanes ... and lane by lane for what is left of `count`.
template <class Isa, class Scalar, class Body>
void sweep(int count, const Body& body) {
  int i = 0;
  for (; i + Isa::kLanes <= count; i += Isa::kLanes) body(Isa{}, i);
  for (; i < count; ++i) body(Scalar{}, i);
}

}  // namespace
}  // namespace qtool
