// A whole encoder in integers: a batch without padding through embeddings and blocks, in one call.
//
// Two forms of the same code share out the work. With many tokens a thread takes a block of rows through everything
// between two attentions, alone (a crew of one): its intermediate results stay in its cache and nobody waits. With few,
// all threads go through all rows together: rows are shared out where a step works on rows, outputs where it multiplies.

#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "integer_attention.h"

namespace qtool {
namespace {  // compiled for each instruction set apart: no copy may serve another

constexpr int kBlockRows = 64;    // whose intermediate results fit a core's second-level cache
constexpr int kAloneRows = 24;    // fewer rows a thread than that, and the threads share the matrices instead
constexpr int kQueryRows = 64;

template <class Isa>
class Encoder {
 public:
  Encoder(const IntEncoder& encoder, const IntBatch& batch, int threads, void* memory) : encoder_(encoder), batch_(batch) {
    const int rows = batch.tokens;
    together_ = rows < kAloneRows * threads;
    if (together_) {
      block_ = rows;
    } else {
      const int pieces = threads * ceil_div(rows, threads * kBlockRows);
      block_ = ceil_div(ceil_div(rows, pieces), Isa::kRows) * Isa::kRows;
    }
    for (int i = 0; i < batch.sequences; ++i) longest_ = std::max(longest_, batch.starts[i + 1] - batch.starts[i]);
    const int tasks = batch.sequences * heads();
    chunk_ = tasks < 3 * threads ? std::min(longest_, kQueryRows) : longest_;
    chunks_ = ceil_div(longest_, std::max(chunk_, 1));
    Cutter cutter(memory);
    const std::int64_t cells = std::int64_t{rows} * encoder.hidden;
    hidden_ = cutter.take<std::int32_t>(cells);
    query_ = cutter.take<std::int32_t>(cells);
    context_ = cutter.take<std::int32_t>(cells);
    key_ = cutter.take<std::int8_t>(cells);
    value_ = cutter.take<std::int8_t>(cells);
    workers_.reserve(threads);
    for (int t = 0; t < threads; ++t) workers_.emplace_back(encoder, t > 0 && together_ ? 0 : block_, longest_, cutter);
    used_ = cutter.used();
    if (memory != nullptr) counters_.reset(new Counter[2 * (encoder.count + 1)]);
  }

  // How much memory the constructor cuts up.
  static std::int64_t bytes(const IntEncoder& encoder, const IntBatch& batch, int threads) {
    return Encoder(encoder, batch, threads, nullptr).used_;
  }

  void run(const Crew& crew, std::int32_t* out) {
    out_ = out;
    between(crew, -1);
    for (int layer = 0; layer < encoder_.count; ++layer) {
      attend(crew, encoder_.blocks[layer].attention, counters_[2 * layer].value);
      crew.wait();
      between(crew, layer);
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

  struct Counter {
    std::atomic<int> value{0};
  };

  static int narrow_stride(const IntEncoder& e) { return ceil_div(std::max(e.hidden, e.norm.size), kQuad) * kQuad; }
  static int inner_stride(const IntEncoder& e) { return ceil_div(e.blocks[0].down.inputs, kQuad) * kQuad; }
  static int widest(const IntEncoder& e) { return std::max({e.hidden, e.norm.size, e.blocks[0].down.inputs}); }
  int heads() const { return encoder_.blocks[0].attention.heads; }
  std::int32_t* row(std::int32_t* matrix, int r) const { return matrix + std::int64_t{r} * encoder_.hidden; }

  // Everything from the attention of `layer` (or from the ids, before the first) to the attention of the next.
  void between(const Crew& crew, int layer) {
    if (together_) {
      rows(crew, workers_[0], workers_[crew.index].row, layer, 0, batch_.tokens);
    } else {
      std::atomic<int>& next = counters_[2 * layer + 3].value;
      for (int begin; (begin = next.fetch_add(block_)) < batch_.tokens;) {
        rows(Crew{}, workers_[crew.index], workers_[crew.index].row, layer, begin, std::min(begin + block_, batch_.tokens));
      }
    }
    crew.wait();
  }

  void rows(const Crew& crew, Worker& scratch, std::int32_t* wide, int layer, int begin, int end) {
    const int count = end - begin;
    const IntBlock* next = layer + 1 < encoder_.count ? &encoder_.blocks[layer + 1] : nullptr;
    if (layer < 0) {
      embed(crew, scratch, wide, begin, count);
    } else {
      finish_block(crew, scratch, wide, encoder_.blocks[layer], begin, count, next == nullptr);
    }
    if (next == nullptr) return;
    quantize(crew, next->query, hidden_, scratch, wide, begin, count);
    crew.wait();
    product(crew, next->query, scratch, count, [&](auto isa, int r, int c, auto y) {
      decltype(isa)::store(row(query_, begin + r) + c, y);
    });
    const auto bytes = [&](std::int8_t* matrix) {
      return [this, matrix, begin](auto isa, int r, int c, auto y) {
        decltype(isa)::store8(reinterpret_cast<std::uint8_t*>(matrix) + std::int64_t{begin + r} * encoder_.hidden + c, y);
      };
    };
    product(crew, next->key, scratch, count, bytes(key_));
    product(crew, next->value, scratch, count, bytes(value_));
  }

  // Output projection, feed-forward layers and both norms.
  void finish_block(const Crew& crew, Worker& scratch, std::int32_t* wide, const IntBlock& block, int begin, int count, bool last) {
    const auto residual = [&](auto isa, int r, int c, auto y) {
      using V = decltype(isa);
      std::int32_t* cell = row(hidden_, begin + r) + c;
      V::store(cell, V::add(V::load(cell), y));
    };
    quantize(crew, block.output, context_, scratch, wide, begin, count);
    crew.wait();
    product(crew, block.output, scratch, count, residual);
    crew.wait();
    for (int r = crew.begin(count); r < crew.end(count); ++r) {
      std::int32_t* x = row(hidden_, begin + r);
      norm_row<Isa>(block.attention_norm, x, x);
      scratch.amax[r] = quantize_input<Isa>(block.up, x, Isa::kOffset, scratch.codes + std::int64_t{r} * stride(block.up), wide);
    }
    crew.wait();
    product(crew, block.up, scratch, count, [&](auto isa, int r, int c, auto y) {
      activate<decltype(isa)>(block.act, y, scratch.inner + std::int64_t{r} * block.up.outputs + c);
    });
    crew.wait();
    for (int r = crew.begin(count); r < crew.end(count); ++r) {
      scratch.amax[r] = quantize_input<Isa>(block.down, scratch.inner + std::int64_t{r} * block.up.outputs, Isa::kOffset,
                                            scratch.inner_codes + std::int64_t{r} * stride(block.down), wide);
    }
    crew.wait();
    multiply_codes(crew, block.down, scratch.inner_codes, scratch.amax, count, residual);
    crew.wait();
    for (int r = crew.begin(count); r < crew.end(count); ++r) {
      std::int32_t* x = row(hidden_, begin + r);
      norm_row<Isa>(block.ffn_norm, x, last ? row(out_, begin + r) : x);
    }
  }

  // Sums of table rows, LayerNorm, and ELECTRA's projection.
  void embed(const Crew& crew, Worker& scratch, std::int32_t* wide, int begin, int count) {
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
        scratch.amax[r] = quantize_input<Isa>(encoder_.projection, x, Isa::kOffset,
                                              scratch.codes + std::int64_t{r} * stride(encoder_.projection), x);
      }
    }
    if (!projects) return;
    crew.wait();
    product(crew, encoder_.projection, scratch, count, [&](auto isa, int r, int c, auto y) {
      decltype(isa)::store(row(hidden_, begin + r) + c, y);
    });
    crew.wait();
  }

  template <class T>
  static void add_row(const IntRows& table, const T* codes, std::int64_t id, int width, std::int32_t* sum) {
    const std::int32_t m = table.multiplier[id], s = table.shift[id];
    sweep<Isa, Portable>(width, [&](auto isa, int c) {
      using V = decltype(isa);
      V::store(sum + c, V::add(V::load(sum + c), V::rescale(V::load(codes + c), V::set(m), V::set(s), kInt32Limit)));
    });
  }

  static int stride(const IntLinear& linear) { return ceil_div(linear.inputs, kQuad) * kQuad; }

  void quantize(const Crew& crew, const IntLinear& linear, std::int32_t* matrix, Worker& scratch, std::int32_t* wide, int begin, int count) {
    for (int r = crew.begin(count); r < crew.end(count); ++r) {
      scratch.amax[r] = quantize_input<Isa>(linear, row(matrix, begin + r), Isa::kOffset,
                                            scratch.codes + std::int64_t{r} * stride(linear), wide);
    }
  }

  template <class Store>
  void product(const Crew& crew, const IntLinear& linear, const Worker& scratch, int count, const Store& store) {
    multiply_codes(crew, linear, scratch.codes, scratch.amax, count, store);
  }

  template <class Store>
  void multiply_codes(const Crew& crew, const IntLinear& linear, const std::uint8_t* codes, const std::int32_t* amax, int count,
                      const Store& store) {
    const int steps = ceil_div(linear.inputs, kQuad), groups = ceil_div(ceil_div(linear.outputs, kTile), Isa::kPanels);
    multiply<Isa>(codes, steps * kQuad, count, linear.weight, std::ptrdiff_t{steps} * 64, steps, crew.begin(groups) * Isa::kPanels,
                  std::min(crew.end(groups) * Isa::kPanels, ceil_div(linear.outputs, kTile)),
                  [&](int r, int column, const std::int32_t* sums, int columns) {
                    finish_sums<Isa>(linear, amax[r], column, sums, columns, [&](auto isa, int c, auto y) { store(isa, r, c, y); });
                  });
  }

  // Tasks are heads of sequences, and where these are few, stretches of their queries.
  void attend(const Crew& crew, const IntAttention& attention, std::atomic<int>& next) {
    const int tasks = batch_.sequences * attention.heads * chunks_;
    Head<Isa>& head = workers_[crew.index].head;
    head.serve(attention);
    for (int task; (task = next.fetch_add(1)) < tasks;) {
      const int chunk = task % chunks_, number = task / chunks_ % attention.heads, sequence = task / chunks_ / attention.heads;
      const int begin = batch_.starts[sequence], keys = batch_.starts[sequence + 1] - begin;
      const int from = chunk * chunk_, to = std::min(from + chunk_, keys);
      if (from >= to) continue;
      const std::int64_t cell = std::int64_t{begin} * encoder_.hidden + number * attention.size;
      head.pack(key_ + cell, value_ + cell, encoder_.hidden, keys, [](int i) { return i; });
      for (int r = from; r < to; r += Isa::kRows) {
        const std::int64_t at = cell + std::int64_t{r} * encoder_.hidden;
        head.attend(number, query_ + at, encoder_.hidden, std::min(Isa::kRows, to - r), context_ + at);
      }
    }
  }

  const IntEncoder& encoder_;
  const IntBatch& batch_;
  bool together_ = false;
  int block_ = 0, longest_ = 0, chunk_ = 0, chunks_ = 0;
  std::int32_t *hidden_, *query_, *context_, *out_ = nullptr;
  std::int8_t *key_, *value_;
  std::int64_t used_ = 0;
  std::vector<Worker> workers_;
  std::unique_ptr<Counter[]> counters_;
};

}  // namespace
}  // namespace qtool
