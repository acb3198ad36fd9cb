// The blocks of an encoder with int8 weights and token-wise int8 activations, float in between, in one call.

#pragma once

#include <vector>

#include "float_attention.h"

namespace qtool {
namespace {

template <class Isa>
class FloatEncoder {
 public:
  FloatEncoder(const QEncoder& encoder, float* hidden, const std::int32_t* starts, int sequences, int threads, void* memory)
      : encoder_(encoder), hidden_(hidden),
        schedule_(starts, sequences, encoder.heads, encoder.count, threads, std::max(Isa::kRows, Isa::kFloatRows)) {
    Cutter cutter(memory);
    const std::int64_t cells = std::int64_t{starts[sequences]} * encoder.hidden;
    query_ = cutter.take<float>(cells);
    key_ = cutter.take<float>(cells);
    value_ = cutter.take<float>(cells);
    context_ = cutter.take<float>(cells);
    workers_.reserve(threads);
    for (int t = 0; t < threads; ++t) workers_.emplace_back(encoder, schedule_.rows_of(t), schedule_.longest(), cutter);
    used_ = cutter.used();
  }

  static std::int64_t bytes(const QEncoder& encoder, const std::int32_t* starts, int sequences, int threads) {
    return FloatEncoder(encoder, nullptr, starts, sequences, threads, nullptr).used_;
  }

  void run(const Crew& crew) {
    for (int layer = 0; layer <= encoder_.count; ++layer) {
      schedule_.by_rows(crew, layer, [&](const Crew& some, int owner, int begin, int end) {
        Worker& scratch = workers_[owner];
        if (layer > 0) finish_block(some, scratch, encoder_.blocks[layer - 1], begin, end - begin);
        if (layer < encoder_.count) start_block(some, scratch, encoder_.blocks[layer], begin, end - begin);
      });
      if (layer < encoder_.count) attend(crew, layer);
    }
  }

 private:
  // A thread's memory: intermediate results of the rows of a block, and a head.
  struct Worker {
    Worker(const QEncoder& e, std::int64_t rows, int longest, Cutter& cutter)
        : codes(cutter.take<std::uint8_t>(rows * stride(e.blocks[0].query))),
          inner_codes(cutter.take<std::uint8_t>(rows * stride(e.blocks[0].down))),
          inner(cutter.take<float>(rows * e.blocks[0].up.outputs)),
          scales(cutter.take<float>(rows)),
          head(e.hidden / e.heads, longest, cutter) {}

    std::uint8_t *codes, *inner_codes;
    float *inner, *scales;
    FloatHead<Isa> head;
  };

  static int stride(const QLinear& linear) { return ceil_div(linear.inputs, kQuad) * kQuad; }
  Target<float> target(float* matrix, int begin) const { return {row(matrix, begin), encoder_.hidden}; }
  float* row(float* matrix, int r) const { return matrix + std::int64_t{r} * encoder_.hidden; }

  void start_block(const Crew& crew, Worker& scratch, const QBlock& block, int begin, int count) {
    quantize(crew, block.query, row(hidden_, begin), encoder_.hidden, scratch.codes, scratch.scales, count);
    crew.wait();
    const auto keep = [](auto isa, float* cell, auto y) { decltype(isa)::store_float(cell, y); };
    product(crew, block.query, scratch.codes, scratch.scales, count, target(query_, begin), keep);
    product(crew, block.key, scratch.codes, scratch.scales, count, target(key_, begin), keep);
    product(crew, block.value, scratch.codes, scratch.scales, count, target(value_, begin), keep);
  }

  void finish_block(const Crew& crew, Worker& scratch, const QBlock& block, int begin, int count) {
    const auto residual = [](auto isa, float* cell, auto y) {
      using V = decltype(isa);
      V::store_float(cell, V::add_float(y, V::load_float(cell)));
    };
    quantize(crew, block.output, row(context_, begin), encoder_.hidden, scratch.codes, scratch.scales, count);
    crew.wait();
    product(crew, block.output, scratch.codes, scratch.scales, count, target(hidden_, begin), residual);
    crew.wait();
    normalize(crew, block.attention_norm, begin, count);
    quantize(crew, block.up, row(hidden_, begin), encoder_.hidden, scratch.codes, scratch.scales, count);
    crew.wait();
    const int width = block.up.outputs;
    const bool relu = encoder_.activation == kFloatRelu;
    product(crew, block.up, scratch.codes, scratch.scales, count, Target<float>{scratch.inner, width},
            [relu](auto isa, float* cell, auto y) {
              using V = decltype(isa);
              V::store_float(cell, relu ? V::max_float(V::set_float(0.0f), y) : gelu<V>(y));
            });
    crew.wait();
    quantize(crew, block.down, scratch.inner, width, scratch.inner_codes, scratch.scales, count);
    crew.wait();
    product(crew, block.down, scratch.inner_codes, scratch.scales, count, target(hidden_, begin), residual);
    crew.wait();
    normalize(crew, block.ffn_norm, begin, count);
  }

  void normalize(const Crew& crew, const Norm& norm, int begin, int count) {
    for (int r = crew.begin(count); r < crew.end(count); ++r) norm_row<Isa>(norm, row(hidden_, begin + r), row(hidden_, begin + r));
  }

  static void quantize(const Crew& crew, const QLinear& linear, const float* x, int width, std::uint8_t* codes, float* scales, int count) {
    for (int r = crew.begin(count); r < crew.end(count); ++r) {
      scales[r] = quantize_row<Isa>(linear, x + std::int64_t{r} * width, Isa::kOffset, codes + std::int64_t{r} * stride(linear));
    }
  }

  template <class Store>
  static void product(const Crew& crew, const QLinear& linear, const std::uint8_t* codes, const float* scales, int count,
                      const Target<float>& target, const Store& store) {
    const int steps = ceil_div(linear.inputs, kQuad), panels = ceil_div(linear.outputs, kTile), groups = ceil_div(panels, Isa::kPanels);
    multiply<Isa>(codes, stride(linear), count, static_cast<const std::int8_t*>(linear.weight), std::ptrdiff_t{steps} * 64, steps,
                  crew.begin(groups) * Isa::kPanels, std::min(crew.end(groups) * Isa::kPanels, panels), target,
                  [&](int first, int rows, int column, const std::int32_t* sums, int width) {
                    finish_sums<Isa>(linear, scales + first, rows, 0, column, sums, width,
                                     [&](auto isa, int r, int c, auto y) { store(isa, target.at(first + r, c), y); });
                  });
  }

  void attend(const Crew& crew, int layer) {
    FloatHead<Isa>& head = workers_[crew.index].head;
    const int size = encoder_.hidden / encoder_.heads;
    schedule_.by_heads(crew, layer, [&](int number, int begin, int keys, int from, int to) {
      const std::int64_t cell = std::int64_t{begin} * encoder_.hidden + number * size;
      head.pack(key_ + cell, value_ + cell, encoder_.hidden, keys);
      for (int r = from; r < to; r += Isa::kFloatRows) {
        const std::int64_t at = cell + std::int64_t{r} * encoder_.hidden;
        const int more = std::min(Isa::kFloatRows, to - r - Isa::kFloatRows);
        if (more > 0) target(query_, begin + r + Isa::kFloatRows).fetch(0, more, number * size, size);
        target(context_, begin + r).fetch(0, std::min(Isa::kFloatRows, to - r), number * size, size);
        head.attend(query_ + at, encoder_.hidden, std::min(Isa::kFloatRows, to - r), context_ + at);
      }
    });
  }

  const QEncoder& encoder_;
  float *hidden_, *query_, *key_, *value_, *context_;
  Schedule schedule_;
  std::int64_t used_ = 0;
  std::vector<Worker> workers_;
};

}  // namespace
}  // namespace qtool
