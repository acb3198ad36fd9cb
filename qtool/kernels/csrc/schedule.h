// How threads share out the work of an encoder. Two forms of the same code: with many tokens a thread takes a block of
// rows through everything between two attentions alone (a crew of one), so that intermediate results stay in its cache
// and nobody waits. With few, all threads go through all rows together: rows are shared out where a step works on rows,
// outputs where it multiplies.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

#include "matrix.h"
#include "team.h"

namespace qtool {
namespace {

// Weights come from the third-level cache or from memory, once a block of rows: the more rows, the less it shows.
constexpr int kBlockRows = 128;
constexpr int kAloneRows = 128;  // fewer rows a thread than that, and the threads share the matrices instead
constexpr int kQueryRows = 64;   // of one head, where heads are too few for the threads

// Cuts memory into arrays, each on cache lines of its own. Without memory it only counts.
class Cutter {
 public:
  explicit Cutter(void* memory) : base_(reinterpret_cast<std::uintptr_t>(memory)) {}

  template <class T>
  T* take(std::int64_t count) {
    auto* found = reinterpret_cast<T*>(base_ + used_);
    used_ += (static_cast<std::uintptr_t>(count) * sizeof(T) + 63) / 64 * 64;
    return found;
  }
  std::int64_t used() const { return static_cast<std::int64_t>(used_); }

 private:
  std::uintptr_t base_, used_ = 0;
};

class Schedule {
 public:
  // `starts` has `sequences` + 1 entries; a layer has `heads` or fewer; row blocks are multiples of `multiple`.
  Schedule(const std::int32_t* starts, int sequences, int heads, int layers, int threads, int multiple)
      : starts_(starts), sequences_(sequences), rows_(starts[sequences]), counters_(new Counter[2 * layers + 2]) {
    together_ = rows_ < kAloneRows * threads;
    const int pieces = threads * ceil_div(rows_, threads * kBlockRows);
    block_ = together_ ? rows_ : ceil_div(ceil_div(rows_, pieces), multiple) * multiple;
    for (int i = 0; i < sequences; ++i) longest_ = std::max(longest_, starts[i + 1] - starts[i]);
    chunk_ = std::max(1, sequences * heads < 3 * threads ? std::min(longest_, kQueryRows) : longest_);
  }

  int longest() const { return longest_; }
  // Whether all threads go through all rows together.
  bool is_together() const { return together_; }
  // Rows of intermediate results that thread `index` needs.
  int rows_of(int index) const { return index > 0 && together_ ? 0 : block_; }

  // Calls `work(crew, owner, begin, end)` until all rows are done, before attention `layer` (0 to `layers`); intermediate
  // results belong to thread `owner`. Returns when all threads are through.
  template <class Work>
  void by_rows(const Crew& crew, int layer, const Work& work) {
    if (together_) {
      work(crew, 0, 0, rows_);
    } else {
      std::atomic<int>& next = counters_[2 * layer].value;
      for (int begin; (begin = next.fetch_add(block_)) < rows_;) {
        work(Crew{}, crew.index, begin, std::min(begin + block_, rows_));
      }
    }
    crew.wait();
  }

  // Calls `work(head, begin, keys, from, to)` for queries [from, to) of a sequence that starts at row `begin`; layers may
  // have different numbers of `heads`.
  template <class Work>
  void by_heads(const Crew& crew, int layer, int heads, const Work& work) {
    std::atomic<int>& next = counters_[2 * layer + 1].value;
    const int chunks = ceil_div(longest_, chunk_), tasks = sequences_ * heads * chunks;
    for (int task; (task = next.fetch_add(1)) < tasks;) {
      const int chunk = task % chunks, head = task / chunks % heads, sequence = task / chunks / heads;
      const int begin = starts_[sequence], keys = starts_[sequence + 1] - begin;
      const int from = chunk * chunk_, to = std::min(from + chunk_, keys);
      if (from < to) work(head, begin, keys, from, to);
    }
    crew.wait();
  }

 private:
  struct Counter {
    std::atomic<int> value{0};
  };

  const std::int32_t* starts_;
  int sequences_, rows_;
  bool together_ = false;
  int block_ = 0, longest_ = 0, chunk_ = 0;
  std::unique_ptr<Counter[]> counters_;
};

}  // namespace
}  // namespace qtool
