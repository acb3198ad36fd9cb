// Attention of one query a head in double precision, for a step of generation with a cache. Every sum is taken in the same
// order on every instruction set.

#pragma once

#include <cmath>

#include "float.h"
#include "schedule.h"

namespace qtool {
namespace {  // compiled for each instruction set apart: no copy may serve another

class WideHeads {
 public:
  static std::int64_t bytes(const WideAttention& attention) {
    Cutter cutter(nullptr);
    WideHeads(attention, cutter);
    return cutter.used();
  }

  static void run(const WideAttention& attention, float* out, int threads, void* memory) {
    auto job = [&](const Crew& crew) {
      Cutter cutter(static_cast<char*>(memory) + crew.index * bytes(attention));
      WideHeads own(attention, cutter);
      const int tasks = attention.batch * attention.groups;
      for (int i = crew.begin(tasks); i < crew.end(tasks); ++i) own.attend(i / attention.groups, i % attention.groups, out);
    };
    together(threads, job);
  }

 private:
  static constexpr int kSums = 8;  // that a product keeps apart, for as many lanes as there are

  WideHeads(const WideAttention& attention, Cutter& cutter) : all_(attention), shared_(attention.heads / attention.groups) {
    query_ = cutter.take<double>(std::int64_t{shared_} * all_.size);
    context_ = cutter.take<double>(std::int64_t{shared_} * all_.size);
    weights_ = cutter.take<double>(std::int64_t{shared_} * all_.keys);
  }

  // All queries that share the keys and values of a group.
  void attend(int batch, int group, float* out) {
    const int first = group * shared_, size = all_.size;
    const float* const query = all_.query + batch * all_.query_batch + first * all_.query_head;
    for (int h = 0; h < shared_; ++h) {
      for (int c = 0; c < size; ++c) query_[h * size + c] = query[h * all_.query_head + c];
    }
    const float* const key = all_.key + batch * all_.key_batch + group * all_.key_head;
    for (int j = 0; j < all_.keys; ++j) {
      for (int h = 0; h < shared_; ++h) {
        weights_[std::int64_t{h} * all_.keys + j] = sees(batch, first + h, j) ? dot(query_ + h * size, key + j * all_.key_token) * all_.scaling : -INFINITY;
      }
    }
    std::fill(context_, context_ + shared_ * size, 0.0);
    double sums[kTogether];
    for (int from = 0; from < shared_; from += kTogether) {
      const int count = std::min(kTogether, shared_ - from);
      for (int h = 0; h < count; ++h) sums[h] = softmax(weights_ + std::int64_t{from + h} * all_.keys);
      mix(batch, group, from, count);
      for (int h = 0; h < count; ++h) {
        float* const cell = out + (std::int64_t{batch} * all_.heads + first + from + h) * size;
        const double* const context = context_ + (from + h) * size;
        for (int c = 0; c < size; ++c) cell[c] = static_cast<float>(sums[h] == 0 ? 0 : context[c] / sums[h]);
      }
    }
  }

  // Adds the values to the contexts of some heads, each times its weight.
  void mix(int batch, int group, int from, int count) {
    const float* const value = all_.value + batch * all_.value_batch + group * all_.value_head;
    for (int j = 0; j < all_.keys; ++j) {
      const float* const row = value + j * all_.value_token;
      for (int h = from; h < from + count; ++h) {
        const double weight = weights_[std::int64_t{h} * all_.keys + j];
        if (weight == 0) continue;  // nobody looks there, whatever stands there
        double* const context = context_ + h * all_.size;
        for (int c = 0; c < all_.size; ++c) context[c] += weight * row[c];
      }
    }
  }

  bool sees(int batch, int head, int key) const {
    return all_.mask == nullptr || all_.mask[batch * all_.mask_batch + head * all_.mask_head + key] != 0;
  }

  double dot(const double* a, const float* b) const {
    double sums[kSums] = {};
    int i = 0;
    for (; i + kSums <= all_.size; i += kSums) {
      for (int l = 0; l < kSums; ++l) sums[l] += a[i + l] * b[i + l];
    }
    double sum = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
    for (; i < all_.size; ++i) sum += a[i] * b[i];
    return sum;
  }

  // Weights e^(x - max) in place, and their sum; 0 for a head that sees nothing.
  double softmax(double* row) const {
    double top = -INFINITY, sum = 0;
    for (int j = 0; j < all_.keys; ++j) top = row[j] > top || std::isnan(row[j]) ? row[j] : top;
    for (int j = 0; j < all_.keys; ++j) {
      row[j] = row[j] == -INFINITY ? 0 : std::exp(row[j] - top);
      sum += row[j];
    }
    return sum;
  }

  static constexpr int kTogether = 8;  // heads for which values are read once

  const WideAttention& all_;
  int shared_;
  double *query_, *context_, *weights_;
};

}  // namespace
}  // namespace qtool
