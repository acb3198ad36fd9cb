// The blocks of an encoder with int8 or int4 weights and int8 activations, float in between, in one call.

#pragma once

#include <vector>

#include "float_attention.h"
#include "float_product.h"

namespace qtool {
namespace {

template <class Isa>
class FloatEncoder {
 public:
  FloatEncoder(const QEncoder& encoder, float* hidden, const std::int32_t* starts, int sequences, int threads, void* memory)
      : encoder_(encoder), hidden_(hidden),
        schedule_(starts, sequences, encoder.hidden / encoder.size, encoder.count, threads, std::max(Isa::kRows, Isa::kFloatRows)) {
    Cutter cutter(memory);
    const std::int64_t cells = std::int64_t{starts[sequences]} * encoder.hidden;
    query_ = cutter.take<float>(cells);
    key_ = cutter.take<float>(cells);
    value_ = cutter.take<float>(cells);
    context_ = cutter.take<float>(cells);
    workers_.reserve(threads);
    std::int64_t unpacked = 0;
    for (int i = 0; i < encoder.count; ++i) unpacked = std::max(unpacked, unpacked_bytes(encoder.blocks[i], schedule_.rows_of(0)));
    for (int t = 0; t < threads; ++t) workers_.emplace_back(encoder, schedule_.rows_of(t), unpacked, schedule_.longest(), cutter);
    used_ = cutter.used();
  }

  static std::int64_t bytes(const QEncoder& encoder, const std::int32_t* starts, int sequences, int threads) {
    return FloatEncoder(encoder, nullptr, starts, sequences, threads, nullptr).used_;
  }

  void run(const Crew& crew) {
    for (int layer = 0; layer <= encoder_.count; ++layer) {
      schedule_.by_rows(crew, layer, [&](const Crew& some, int owner, int begin, int end) {
        // A thread is alone with what it owns, or one of those that share what the first one owns.
        const Rows rows = {some, workers_[owner], workers_[owner + some.index].unpacked, begin, end - begin};
        if (layer > 0) finish_block(rows, encoder_.blocks[layer - 1]);
        if (layer < encoder_.count) start_block(rows, encoder_.blocks[layer]);
      });
      if (layer < encoder_.count) attend(crew, layer);
    }
  }

 private:
  using Product = FloatProduct<Isa>;

  // A thread's memory: intermediate results of the rows of a block, unpacked weights, and a head.
  struct Worker {
    Worker(const QEncoder& e, std::int64_t rows, std::int64_t unpacked_bytes, int longest, Cutter& cutter)
        : codes(cutter.take<std::uint8_t>(rows * Product::stride(e.blocks[0].up))),
          inner_codes(cutter.take<std::uint8_t>(rows * Product::stride(e.blocks[0].down))),
          inner(cutter.take<float>(rows * e.blocks[0].up.outputs)),
          scales(cutter.take<float>(rows)),
          unpacked(cutter.take<std::int8_t>(unpacked_bytes)),
          head(e.size, longest, cutter) {}

    std::uint8_t *codes, *inner_codes;
    float *inner, *scales;
    std::int8_t* unpacked;
    FloatHead<Isa> head;
  };

  // Rows that a crew takes through a block, and where; `unpacked` is each thread's own.
  struct Rows {
    const Crew& crew;
    Worker& scratch;
    std::int8_t* unpacked;
    int begin, count;
  };

  static std::int64_t unpacked_bytes(const QBlock& block, int rows) {
    std::int64_t most = 0;
    for (const QLinear* linear : {&block.query, &block.key, &block.value, &block.output, &block.up, &block.down}) {
      if (linear->inputs * linear->outputs == 0) continue;
      most = std::max(most, Product::unpacked_bytes(*linear, rows));
    }
    return most;
  }
  Target<float> target(float* matrix, int begin) const { return {row(matrix, begin), encoder_.hidden}; }
  float* row(float* matrix, int r) const { return matrix + std::int64_t{r} * encoder_.hidden; }
  // Of what attention reads and gives: rows are as wide as all heads of the block.
  static Target<float> target(float* matrix, int begin, const QBlock& block) {
    return {matrix + std::int64_t{begin} * block.query.outputs, block.query.outputs};
  }

  void start_block(const Rows& rows, const QBlock& block) {
    if (block.query.outputs == 0) return;
    quantize(rows, block.query, row(hidden_, rows.begin), rows.scratch.codes);
    const auto keep = [](auto isa, float* cell, auto y) { decltype(isa)::store_float(cell, y); };
    product(rows, block.query, rows.scratch.codes, target(query_, rows.begin, block), keep);
    product(rows, block.key, rows.scratch.codes, target(key_, rows.begin, block), keep);
    product(rows, block.value, rows.scratch.codes, target(value_, rows.begin, block), keep);
  }

  void finish_block(const Rows& rows, const QBlock& block) {
    Worker& scratch = rows.scratch;
    float* const hidden = row(hidden_, rows.begin);
    const auto residual = [](auto isa, float* cell, auto y) {
      using V = decltype(isa);
      V::store_float(cell, V::add_float(y, V::load_float(cell)));
    };
    if (block.query.outputs == 0) {
      add_bias(rows, block.output);
    } else {
      quantize(rows, block.output, target(context_, rows.begin, block).first, scratch.codes);
      product(rows, block.output, scratch.codes, target(hidden_, rows.begin), residual);
    }
    rows.crew.wait();
    normalize(rows, block.attention_norm);
    quantize(rows, block.up, hidden, scratch.codes);
    const bool relu = encoder_.activation == kFloatRelu;
    product(rows, block.up, scratch.codes, Target<float>{scratch.inner, block.up.outputs}, [relu](auto isa, float* cell, auto y) {
      using V = decltype(isa);
      V::store_float(cell, relu ? V::max_float(V::set_float(0.0f), y) : gelu<V>(y));
    });
    rows.crew.wait();
    quantize(rows, block.down, scratch.inner, scratch.inner_codes);
    product(rows, block.down, scratch.inner_codes, target(hidden_, rows.begin), residual);
    rows.crew.wait();
    normalize(rows, block.ffn_norm);
  }

  // To the rows that the thread normalizes next.
  void add_bias(const Rows& rows, const QLinear& linear) {
    if (linear.bias == nullptr) return;
    for (int r = rows.crew.begin(rows.count); r < rows.crew.end(rows.count); ++r) {
      float* const x = row(hidden_, rows.begin + r);
      for (int i = 0; i < encoder_.hidden; ++i) x[i] += linear.bias[i];
    }
  }

  void normalize(const Rows& rows, const Norm& norm) {
    for (int r = rows.crew.begin(rows.count); r < rows.crew.end(rows.count); ++r) {
      norm_row<Isa>(norm, row(hidden_, rows.begin + r), row(hidden_, rows.begin + r));
    }
  }

  // Codes of all rows, and their scales; returns when the crew has made them.
  static void quantize(const Rows& rows, const QLinear& linear, const float* x, std::uint8_t* codes) {
    quantize_rows<Isa>(rows.crew, linear, x, rows.count, codes, rows.scratch.scales);
    rows.crew.wait();
  }

  template <class Store>
  static void product(const Rows& rows, const QLinear& linear, const std::uint8_t* codes, const Target<float>& target, const Store& store) {
    const int groups = Product::groups(linear);
    Product(linear, codes, rows.scratch.scales, rows.count, rows.unpacked)
        .run(rows.crew.begin(groups), rows.crew.end(groups), target, store);
  }

  void attend(const Crew& crew, int layer) {
    FloatHead<Isa>& head = workers_[crew.index].head;
    const QBlock& block = encoder_.blocks[layer];
    const int size = encoder_.size, width = block.query.outputs;
    schedule_.by_heads(crew, layer, width / size, [&](int number, int begin, int keys, int from, int to) {
      const std::int64_t cell = std::int64_t{begin} * width + number * size;
      head.pack(key_ + cell, value_ + cell, width, keys);
      for (int r = from; r < to; r += Isa::kFloatRows) {
        const std::int64_t at = cell + std::int64_t{r} * width;
        const int more = std::min(Isa::kFloatRows, to - r - Isa::kFloatRows);
        if (more > 0) target(query_, begin + r + Isa::kFloatRows, block).fetch(0, more, number * size, size);
        target(context_, begin + r, block).fetch(0, std::min(Isa::kFloatRows, to - r), number * size, size);
        head.attend(query_ + at, width, std::min(Isa::kFloatRows, to - r), context_ + at);
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
