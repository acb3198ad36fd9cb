// A whole encoder in integers: a batch without padding through embeddings and blocks, in one call.

#pragma once

#include <vector>

#include "integer_attention.h"

namespace qtool {
namespace {  // compiled for each instruction set apart: no copy may serve another

template <class Isa>
class Encoder {
 public:
  Encoder(const IntEncoder& encoder, const IntBatch& batch, std::int32_t* out, int threads, void* memory)
      : encoder_(encoder), batch_(batch), out_(out),
        schedule_(batch.starts, batch.sequences, most_heads(encoder), encoder.count, threads, Isa::kRows) {
    const int rows = batch.tokens;
    Cutter cutter(memory);
    const std::int64_t cells = std::int64_t{rows} * encoder.hidden;
    hidden_ = cutter.take<std::int32_t>(cells);
    query_ = cutter.take<std::int16_t>(cells);
    context_ = cutter.take<std::int16_t>(cells);
    key_ = cutter.take<std::int8_t>(cells);
    value_ = cutter.take<std::int8_t>(cells);
    workers_.reserve(threads);
    for (int t = 0; t < threads; ++t) workers_.emplace_back(encoder, schedule_.rows_of(t), schedule_.longest(), cutter);
    used_ = cutter.used();
  }

  // How much memory the constructor cuts up.
  static std::int64_t bytes(const IntEncoder& encoder, const IntBatch& batch, int threads) {
    return Encoder(encoder, batch, nullptr, threads, nullptr).used_;
  }

  void run(const Crew& crew) {
    for (int layer = 0; layer <= encoder_.count; ++layer) {
      schedule_.by_rows(crew, layer, [&](const Crew& some, int owner, int begin, int end) {
        rows(some, workers_[owner], workers_[crew.index].row, layer, begin, end);
      });
      if (layer < encoder_.count) attend(crew, layer);
    }
  }

 private:
  // A thread's memory: intermediate results of the rows of a block, a row, and a head.
  struct Worker {
    Worker(const IntEncoder& e, std::int64_t rows, int longest, Cutter& cutter)
        : codes(cutter.take<std::uint8_t>(rows * narrow_stride(e))),
          inner_codes(cutter.take<std::uint8_t>(rows * inner_stride(e))),
          inner(cutter.take<std::int16_t>(rows * e.blocks[0].up.outputs)),
          amax(cutter.take<std::int32_t>(rows)),
          row(cutter.take<std::int32_t>(widest(e))),
          head(e.blocks[0].attention, longest, cutter) {}

    std::uint8_t *codes, *inner_codes;
    std::int16_t* inner;
    std::int32_t *amax, *row;
    Head<Isa> head;
  };

  static int most_heads(const IntEncoder& e) {
    int most = 0;
    for (int i = 0; i < e.count; ++i) most = std::max(most, e.blocks[i].attention.heads);
    return most;
  }
  static int narrow_stride(const IntEncoder& e) { return ceil_div(std::max(e.hidden, e.norm.size), kQuad) * kQuad; }
  static int inner_stride(const IntEncoder& e) { return ceil_div(e.blocks[0].down.inputs, kQuad) * kQuad; }
  static int widest(const IntEncoder& e) { return std::max({e.hidden, e.norm.size, e.blocks[0].down.inputs}); }
  template <class T>
  T* row(T* matrix, int r) const {
    return matrix + std::int64_t{r} * encoder_.hidden;
  }
  template <class T>
  Target<T> target(T* matrix, int begin) const {
    return {row(matrix, begin), encoder_.hidden};
  }

  // Of what attention reads and gives: rows are as wide as all heads of the block.
  template <class T>
  static Target<T> target(T* matrix, int begin, const IntBlock& block) {
    return {matrix + std::int64_t{begin} * block.query.outputs, block.query.outputs};
  }

  // Everything from the attention before `layer` (or from the ids) to its own.
  void rows(const Crew& crew, Worker& scratch, std::int32_t* wide, int layer, int begin, int end) {
    const int count = end - begin;
    const IntBlock* next = layer < encoder_.count ? &encoder_.blocks[layer] : nullptr;
    if (layer == 0) {
      embed(crew, scratch, wide, begin, count, next);
    } else {
      finish_block(crew, scratch, wide, encoder_.blocks[layer - 1], begin, count, next);
    }
    if (next == nullptr) return;
    crew.wait();
    const auto keep = [](auto isa, auto* cell, auto y) { decltype(isa)::put(cell, y); };
    product(crew, next->query, scratch, count, target(query_, begin, *next), keep);
    product(crew, next->key, scratch, count, target(key_, begin, *next), keep);
    product(crew, next->value, scratch, count, target(value_, begin, *next), keep);
  }

  // Output projection, feed-forward layers and both norms.
  void finish_block(const Crew& crew, Worker& scratch, std::int32_t* wide, const IntBlock& block, int begin, int count,
                    const IntBlock* next) {
    const auto residual = [](auto isa, std::int32_t* cell, auto y) {
      using V = decltype(isa);
      V::put(cell, V::add(V::load(cell), y));
    };
    const Target<std::int16_t> context = target(context_, begin, block);
    for (int r = crew.begin(count); r < crew.end(count); ++r) quantize_row(block.output, context.at(r, 0), scratch, r, wide);
    crew.wait();
    product(crew, block.output, scratch, count, target(hidden_, begin), residual);
    crew.wait();
    for (int r = crew.begin(count); r < crew.end(count); ++r) {
      std::int32_t* x = row(hidden_, begin + r);
      norm_row<Isa>(block.attention_norm, x, x);
      quantize_row(block.up, x, scratch, r, wide);
    }
    crew.wait();
    const Target<std::int16_t> inner{scratch.inner, block.up.outputs};
    product(crew, block.up, scratch, count, inner, [act = block.act](auto isa, std::int16_t* cell, auto y) {
      activate<decltype(isa)>(act, y, cell);
    });
    crew.wait();
    for (int r = crew.begin(count); r < crew.end(count); ++r) {
      scratch.amax[r] = quantize_input<Isa>(block.down, scratch.inner + std::int64_t{r} * block.up.outputs, Isa::kOffset,
                                            scratch.inner_codes + std::int64_t{r} * stride(block.down), wide);
    }
    crew.wait();
    multiply_codes(crew, block.down, scratch.inner_codes, scratch.amax, count, target(hidden_, begin), residual);
    crew.wait();
    for (int r = crew.begin(count); r < crew.end(count); ++r) {
      std::int32_t* x = row(hidden_, begin + r);
      norm_row<Isa>(block.ffn_norm, x, next == nullptr ? row(out_, begin + r) : x);
      if (next != nullptr) quantize_row(next->query, x, scratch, r, wide);
    }
  }

  // Sums of table rows, LayerNorm, and ELECTRA's projection.
  void embed(const Crew& crew, Worker& scratch, std::int32_t* wide, int begin, int count, const IntBlock* next) {
    const int width = encoder_.norm.size;
    const bool projects = encoder_.projection.weight != nullptr;
    for (int r = crew.begin(count); r < crew.end(count); ++r) {
      std::fill(wide, wide + width, 0);
      for (int t = 0; t < kTables; ++t) {
        const IntRows& table = encoder_.tables[t];
        if (table.weight == nullptr) continue;
        const std::int64_t id = batch_.ids[t][begin + r];
        if (table.bits == 8) {
          add_row(table, static_cast<const std::int8_t*>(table.weight) + id * width, id, width, wide);
        } else {
          add_row(table, static_cast<const std::int16_t*>(table.weight) + id * width, id, width, wide);
        }
      }
      std::int32_t* x = projects ? wide : row(hidden_, begin + r);
      norm_row<Isa>(encoder_.norm, wide, x);
      if (projects) {
        quantize_row(encoder_.projection, x, scratch, r, x);
      } else if (next != nullptr) {
        quantize_row(next->query, x, scratch, r, wide);
      }
    }
    if (!projects) return;
    crew.wait();
    product(crew, encoder_.projection, scratch, count, target(hidden_, begin),
            [](auto isa, std::int32_t* cell, auto y) { decltype(isa)::put(cell, y); });
    crew.wait();
    if (next != nullptr) quantize(crew, next->query, hidden_, scratch, wide, begin, count);
  }

  template <class T>
  static void add_row(const IntRows& table, const T* codes, std::int64_t id, int width, std::int32_t* sum) {
    const std::int32_t m = table.multiplier[id], s = table.shift[id];
    sweep<Isa, Portable>(width, [&](auto isa, int c) {
      using V = decltype(isa);
      V::put(sum + c, V::add(V::load(sum + c), V::rescale(V::load(codes + c), V::set(m), V::set(s), kInt32Limit)));
    });
  }

  static int stride(const IntLinear& linear) { return ceil_div(linear.inputs, kQuad) * kQuad; }

  template <class T>
  void quantize(const Crew& crew, const IntLinear& linear, T* matrix, Worker& scratch, std::int32_t* wide, int begin, int count) {
    for (int r = crew.begin(count); r < crew.end(count); ++r) quantize_row(linear, row(matrix, begin + r), scratch, r, wide);
  }

  template <class T>
  static void quantize_row(const IntLinear& linear, const T* x, Worker& scratch, int r, std::int32_t* wide) {
    scratch.amax[r] = quantize_input<Isa>(linear, x, Isa::kOffset, scratch.codes + std::int64_t{r} * stride(linear), wide);
  }

  template <class T, class Store>
  void product(const Crew& crew, const IntLinear& linear, const Worker& scratch, int count, const Target<T>& target,
               const Store& store) {
    multiply_codes(crew, linear, scratch.codes, scratch.amax, count, target, store);
  }

  template <class T, class Store>
  void multiply_codes(const Crew& crew, const IntLinear& linear, const std::uint8_t* codes, const std::int32_t* amax, int count,
                      const Target<T>& target, const Store& store) {
    const int steps = ceil_div(linear.inputs, kQuad), groups = ceil_div(ceil_div(linear.outputs, kTile), Isa::kPanels);
    multiply<Isa>(codes, steps * kQuad, count, linear.weight, std::ptrdiff_t{steps} * 64, steps, crew.begin(groups) * Isa::kPanels,
                  std::min(crew.end(groups) * Isa::kPanels, ceil_div(linear.outputs, kTile)), target,
                  [&](int first, int rows, int column, const std::int32_t* sums, int width) {
                    finish_sums<Isa>(linear, amax + first, rows, column, sums, width,
                                     [&](auto isa, int r, int c, auto y) { store(isa, target.at(first + r, c), y); });
                  });
  }

  void attend(const Crew& crew, int layer) {
    Head<Isa>& head = workers_[crew.index].head;
    const IntBlock& block = encoder_.blocks[layer];
    const IntAttention& attention = block.attention;
    const int width = block.query.outputs;
    head.serve(attention);
    schedule_.by_heads(crew, layer, attention.heads, [&](int number, int begin, int keys, int from, int to) {
      const std::int64_t cell = std::int64_t{begin} * width + number * attention.size;
      head.pack(key_ + cell, value_ + cell, width, keys, [](int i) { return i; });
      for (int r = from; r < to; r += Isa::kRows) {
        const std::int64_t at = cell + std::int64_t{r} * width;
        const int more = std::min(Isa::kRows, to - r - Isa::kRows);
        if (more > 0) target(query_, begin + r + Isa::kRows, block).fetch(0, more, number * attention.size, attention.size);
        target(context_, begin + r, block).fetch(0, std::min(Isa::kRows, to - r), number * attention.size, attention.size);
        head.attend(number, query_ + at, width, std::min(Isa::kRows, to - r), context_ + at);
      }
    });
  }

  const IntEncoder& encoder_;
  const IntBatch& batch_;
  std::int32_t* out_;
  Schedule schedule_;
  std::int32_t* hidden_;
  std::int16_t *query_, *context_;  // both have 16 bits
  std::int8_t *key_, *value_;
  std::int64_t used_ = 0;
  std::vector<Worker> workers_;
};

}  // namespace
}  // namespace qtool
