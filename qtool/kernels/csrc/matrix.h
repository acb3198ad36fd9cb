// The int8 matrix product: rows of activation codes by weights in tiles of 16 outputs by 4 inputs.

#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <utility>

namespace qtool {
namespace {  // compiled for each instruction set apart: no copy may serve another

constexpr int kTile = 16;   // outputs a panel
constexpr int kQuad = 4;    // inputs a step

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

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

// Products of `rows` rows of `a`, `stride` bytes apart, with panels [begin, end) of `w`; a panel has `steps` tiles and
// starts `panel` bytes behind the one before. `done(row, column, sums, count)` gets `count` int32 sums, a multiple of 16.
template <class Isa, class Done>
void multiply(const std::uint8_t* a, std::ptrdiff_t stride, int rows, const std::int8_t* w, std::ptrdiff_t panel, int steps, int begin,
              int end, const Done& done) {
  alignas(64) std::int32_t sums[Isa::kRows * Isa::kPanels * kTile];
  for (int p = begin; p < end; p += Isa::kPanels) {
    const int panels = std::min(Isa::kPanels, end - p);
    for (int r = 0; r < rows; r += Isa::kRows) {
      const int block = std::min(Isa::kRows, rows - r);
      Tiles<Isa>::of(block, panels)(a + r * stride, stride, w + p * panel, panel, steps, sums);
      for (int i = 0; i < block; ++i) done(r + i, p * kTile, sums + i * panels * kTile, panels * kTile);
    }
  }
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
