// Attention on int8 codes with a float softmax between the products: the operation of kernels/attention.py, bit for bit.

#pragma once

#include <algorithm>
#include <cfloat>

#include "code_rows.h"
#include "float_rows.h"
#include "schedule.h"
#include "team.h"

namespace qtool {
namespace {

// 2^x for -126 <= x <= 0: kernels/attention.py, exp2. Every step is rounded by itself, so nothing is fused.
template <class V>
typename V::Float power_of_two(typename V::Float x) {
  const auto whole = V::floor_float(V::add_float(x, V::set_float(0.5f)));
  const auto rest = V::sub_float(x, whole);
  auto p = V::set_float(0.0001546145f);
  for (const float coefficient : {0.0013390867f, 0.0096180567f, 0.0555035710f, 0.2402265092f, 0.6931471880f, 1.0f}) {
    p = V::add_float(V::mul_float(p, rest), V::set_float(coefficient));
  }
  return V::scale_float(p, V::to_int(whole));
}

// The keys and values of one head as tiles, and what a block of query rows needs.
template <class Isa>
class CodeHead {
 public:
  static constexpr int kRows = Isa::kRows;

  CodeHead(const Int8Attention& at, Cutter& cutter)
      : book_(at.book), level_unit_(at.level_unit), size_(at.size), count_(at.keys), padded_(ceil_div(at.keys, kTile) * kTile),
        quads_(ceil_div(at.size, kQuad)), panels_(ceil_div(at.size, kTile)), ladder_(cutter) {
    keys_ = cutter.take<std::int8_t>(std::int64_t{padded_} * quads_ * kQuad);
    values_ = cutter.take<std::int8_t>(std::int64_t{padded_} * panels_ * kTile);
    key_sums_ = cutter.take<std::int32_t>(padded_);
    value_sums_ = cutter.take<std::int32_t>(panels_ * kTile);
    query_ = cutter.take<std::uint8_t>(std::int64_t{kRows} * quads_ * kQuad);
    scores_ = cutter.take<float>(std::int64_t{kRows} * padded_);
    weights_ = cutter.take<std::int32_t>(padded_);
    codes_ = cutter.take<std::uint8_t>(std::int64_t{kRows} * padded_ * (by_levels() ? kDigits : 1));
    units_ = cutter.take<float>(padded_);
    found_ = cutter.take<std::uint8_t>(by_levels() ? padded_ : 0);
    high_ = cutter.take<std::int32_t>(by_levels() ? kRows * panels_ * kTile : 0);
  }

  // Takes over codes [keys][size] and what a key's code is worth.
  void pack(const std::int8_t* key, const std::int8_t* value, const float* units) {
    std::memset(keys_, 0, static_cast<std::size_t>(padded_) * quads_ * kQuad);
    std::memset(values_, 0, static_cast<std::size_t>(padded_) * panels_ * kTile);
    std::memset(value_sums_, 0, sizeof(std::int32_t) * panels_ * kTile);
    for (int j = 0; j < padded_; ++j) {
      units_[j] = j < count_ ? units[j] : 0.0f;
      key_sums_[j] = 0;
      if (j >= count_) continue;
      const std::int8_t *k = key + std::ptrdiff_t{j} * size_, *v = value + std::ptrdiff_t{j} * size_;
      std::int8_t* tile = keys_ + std::ptrdiff_t{j / kTile} * quads_ * 64 + (j % kTile) * kQuad;
      std::int8_t* column = values_ + std::ptrdiff_t{j / kQuad} * 64 + j % kQuad;
      for (int c = 0; c < size_; ++c) {
        tile[(c / kQuad) * 64 + c % kQuad] = k[c];
        column[std::ptrdiff_t{c / kTile} * padded_ * kTile + (c % kTile) * kQuad] = v[c];
        key_sums_[j] += k[c];
        value_sums_[c] += v[c];
      }
    }
  }

  // Context [count][size] of rows of query codes, at most kRows; `mask(r)` are the bytes of row r, or null, and `head(r)` is
  // its head. Codes of probabilities go to `codes` [count][keys].
  template <class Mask, class HeadOf>
  void attend(const std::int8_t* query, const float* units, int count, const Mask& mask, const HeadOf& head, float value_scale,
              float* out, std::uint8_t* codes) {
    const int width = quads_ * kQuad;
    for (int r = 0; r < count; ++r) {
      for (int c = 0; c < size_; ++c) query_[r * width + c] = static_cast<std::uint8_t>(query[r * size_ + c] + Isa::kOffset);
      for (int c = size_; c < width; ++c) query_[r * width + c] = 0;
    }
    multiply<Isa>(query_, width, count, keys_, quads_ * 64, quads_, 0, padded_ / kTile, Near{},
                  [&](int, int rows, int column, const std::int32_t* sums, int columns) {
                    for (int i = 0; i < columns; i += Isa::kLanes) {
                      const auto shift = Isa::mul(Isa::load(key_sums_ + column + i), Isa::set(Isa::kOffset));
                      const auto unit = Isa::load_float(units_ + column + i);
                      for (int r = 0; r < rows; ++r) {
                        const auto sum = Isa::to_float(Isa::sub(Isa::load(sums + r * columns + i), shift));
                        Isa::store_float(scores_ + std::ptrdiff_t{r} * padded_ + column + i,
                                         Isa::mul_float(Isa::mul_float(sum, Isa::set_float(units[r])), unit));
                      }
                    }
                  });
    int digits = 1;
    for (int r = 0; r < count && by_levels(); ++r) digits = std::max(digits, digits_of(head(r)));
    Row rows[kRows];
    for (int r = 0; r < count; ++r) {
      float* row = scores_ + std::ptrdiff_t{r} * padded_;
      std::uint8_t *multiplied = codes_ + std::ptrdiff_t{r} * padded_, *plain = codes + std::ptrdiff_t{r} * count_;
      const float spoiled = weigh(row, mask(r), book_.count > 0 ? kCodedFraction : kFraction);
      if (book_.count == 0) {
        rows[r] = {static_cast<float>(diffuse<kFraction>(multiplied, plain)), 1.0f, spoiled};
      } else {
        rows[r] = encode(head(r), Digits{multiplied, std::ptrdiff_t{kRows} * padded_, digits}, plain);
        rows[r].spoiled = spoiled;
      }
    }
    const int moved = by_levels() ? 0 : kMiddle - Isa::kOffset;
    for (int d = digits - 1; d >= 0; --d) {
      multiply<Isa>(codes_ + std::ptrdiff_t{d} * kRows * padded_, padded_, count, values_, std::ptrdiff_t{padded_} * kTile,
                    padded_ / kQuad, 0, panels_, Near{}, [&](int, int block, int column, const std::int32_t* sums, int columns) {
                      if (d > 0) {
                        keep_high(block, column, sums, columns);
                      } else {
                        finish(rows, block, column, sums, columns, moved, digits > 1, value_scale, out);
                      }
                    });
    }
  }

 private:
  static constexpr int kMiddle = 127, kLevels = 254, kFraction = 8, kCodedFraction = 14;
  static constexpr int kLargest = kLevels << kCodedFraction;
  static constexpr int kDigits = 2;  // of 7 bits, for levels
  static constexpr float kLowest = -24.0f;

  // What a row of products becomes: products / total * factor * value scale + spoiled.
  struct Row {
    float total, factor, spoiled;
  };

  bool by_levels() const { return book_.levels != nullptr; }
  const std::int32_t* levels_of(int head) const { return book_.levels + std::ptrdiff_t{head} * (book_.count + 1); }
  int digits_of(int head) const { return *std::max_element(levels_of(head), levels_of(head) + book_.count + 1) > 127 ? 2 : 1; }

  // Keeps the sums of the high digits of some rows.
  void keep_high(int rows, int column, const std::int32_t* sums, int columns) {
    for (int r = 0; r < rows; ++r) {
      for (int i = 0; i < columns; i += Isa::kLanes) {
        Isa::put(high_ + r * panels_ * kTile + column + i, Isa::shift_left(Isa::load(sums + r * columns + i), 7));
      }
    }
  }

  // Context of some rows, from sums of codes that are `moved` less than they should be times values.
  void finish(const Row* rows, int count, int column, const std::int32_t* sums, int columns, int moved, bool high, float value_scale,
              float* out) const {
    sweep_float<Isa>(std::min(columns, size_ - column), [&](auto isa, int i) {
      using V = decltype(isa);
      const auto shift = V::mul(V::load(value_sums_ + column + i), V::set(moved));
      for (int r = 0; r < count; ++r) {
        auto sum = V::add(V::load(sums + r * columns + i), shift);
        if (high) sum = V::add(sum, V::load(high_ + r * panels_ * kTile + column + i));
        const auto mean = V::mul_float(V::div_float(V::to_float(sum), V::set_float(rows[r].total)), V::set_float(rows[r].factor));
        V::store_float(out + std::ptrdiff_t{r} * size_ + column + i,
                       V::add_float(V::mul_float(mean, V::set_float(value_scale)), V::set_float(rows[r].spoiled)));
      }
    });
  }

  // The codes of weights_ by the codebook of a head, as they are and as what is multiplied.
  Row encode(int head, const Digits& multiplied, std::uint8_t* plain) {
    const std::int64_t sum = sum_row<Isa>(weights_, padded_), whole = book_.relative != 0 ? kLargest : sum;
    const auto positive = [](std::int64_t x) { return static_cast<float>(x < 1 ? 1 : x); };
    const std::int32_t* edges = book_.edges + std::ptrdiff_t{head} * book_.count;
    if (!by_levels()) {
      const std::int64_t kept = prune_row<Isa>(weights_, padded_, least_weight(edges[0], whole));
      const auto total = static_cast<float>(diffuse<kCodedFraction>(multiplied.out, plain));
      return {total, book_.renormalize != 0 ? 1.0f : static_cast<float>(kept) / positive(sum), 0.0f};
    }
    ladder_.serve(levels_of(head), book_.count);
    ladder_.limit(edges, whole);
    std::uint8_t* found = found_;
    const std::int32_t* weights = weights_;
    const auto load = [weights](int i) { return Isa::load(weights + i); };
    const std::int64_t total = ladder_.row(load, padded_, [found, &multiplied](int i, auto level, auto code) {
      multiplied.put<Isa>(i, level);
      Isa::put(found + i, code);
    });
    std::memcpy(plain, found, count_);
    if (book_.renormalize != 0) return {positive(total), 1.0f, 0.0f};
    if (book_.relative != 0) return {positive(sum), level_unit_[head] * static_cast<float>(kLargest), 0.0f};
    return {1.0f, level_unit_[head], 0.0f};
  }

  // Weights of a row of scores in units of 2^-`fraction` of a code, to weights_. Returns 0, or NaN where a score that counts
  // is not a number.
  float weigh(float* row, const std::uint8_t* mask, int fraction) {
    for (int j = count_; j < padded_; ++j) row[j] = -FLT_MAX;
    if (mask != nullptr) {
      for (int j = 0; j < count_; ++j) row[j] = mask[j] != 0 ? row[j] : -FLT_MAX;
    }
    auto top = Isa::set_float(-FLT_MAX), spoiled = Isa::set_float(0.0f);
    for (int j = 0; j < padded_; j += Isa::kLanes) {
      const auto score = Isa::load_float(row + j);
      top = Isa::max_float(top, score);
      spoiled = Isa::add_float(spoiled, Isa::mul_float(score, Isa::set_float(0.0f)));
    }
    const float largest = Isa::reduce_max_float(top);
    if (!(largest > -FLT_MAX)) {  // nothing to look at, or nothing but damage
      std::memset(weights_, 0, sizeof(std::int32_t) * padded_);
      return Isa::reduce_add_float(spoiled);
    }
    std::int32_t* weights = weights_;
    const int padded = padded_;
    for (int j = 0; j < padded; j += Isa::kLanes) {
      auto x = Isa::sub_float(Isa::load_float(row + j), Isa::set_float(largest));
      x = Isa::min_float(Isa::max_float(x, Isa::set_float(kLowest)), Isa::set_float(0.0f));
      const auto weight = Isa::mul_float(power_of_two<Isa>(x), Isa::set_float(static_cast<float>(kLevels << fraction)));
      Isa::put(weights + j, Isa::to_int(Isa::floor_float(Isa::add_float(weight, Isa::set_float(0.5f)))));
    }
    return Isa::reduce_add_float(spoiled);
  }

  // Rounds the running sum of weights_ to codes, as they are multiplied and as they are. Returns their sum, at least 1.
  template <int F>
  std::int32_t diffuse(std::uint8_t* multiplied, std::uint8_t* plain) const {
    const std::int32_t* weights = weights_;  // what is stored here cannot change that
    const int count = count_;
    std::int64_t sum = 1 << (F - 1);
    std::int32_t before = 0;
    for (int j = 0; j < count; ++j) {
      sum += weights[j];
      const auto now = static_cast<std::int32_t>(sum >> F);
      plain[j] = static_cast<std::uint8_t>(now - before);
      before = now;
    }
    for (int j = 0; j < count; ++j) multiplied[j] = static_cast<std::uint8_t>(plain[j] - kMiddle + Isa::kOffset);
    std::memset(multiplied + count, 0, padded_ - count);  // their values are 0
    return before > 0 ? before : 1;
  }

  WholeCodebook book_;
  const float* level_unit_;
  int size_, count_, padded_, quads_, panels_;
  Ladder<Isa> ladder_;
  std::int8_t *keys_, *values_;
  std::int32_t *key_sums_, *value_sums_, *weights_, *high_;
  std::uint8_t *query_, *codes_, *found_;
  float *scores_, *units_;
};

template <class Isa>
struct CodeAttention {
  static std::int64_t bytes(const Int8Attention& at) {
    Cutter cutter(nullptr);
    CodeHead<Isa>(at, cutter);
    return cutter.used();
  }

  // Groups of heads that share keys are dealt to threads; where there are fewer, their rows too.
  static void run(const Int8Attention& at, float* out, std::uint8_t* codes, int threads, void* memory) {
    const std::int64_t each = bytes(at);
    const int groups = at.batch * at.groups, rows = at.heads / at.groups * at.queries, blocks = ceil_div(rows, Isa::kRows);
    const int shares = groups >= 2 * threads ? 1 : std::min(blocks, threads);
    auto job = [&](const Crew& crew) {
      Cutter cutter(static_cast<std::uint8_t*>(memory) + each * crew.index);
      CodeHead<Isa> head(at, cutter);
      for (int task = crew.begin(groups * shares); task < crew.end(groups * shares); ++task) {
        const int cell = task / shares, share = task % shares;
        const std::int64_t key = std::int64_t{cell} * at.keys;
        head.pack(at.key + key * at.size, at.value + key * at.size, at.key_unit + key);
        const int end = std::min<std::int64_t>(rows, std::int64_t{blocks} * (share + 1) / shares * Isa::kRows);
        for (int r = static_cast<int>(std::int64_t{blocks} * share / shares) * Isa::kRows; r < end; r += Isa::kRows) {
          const std::int64_t row = std::int64_t{cell} * rows + r;
          head.attend(at.query + row * at.size, at.unit + row, std::min(Isa::kRows, end - r),
                      [&](int i) { return masked(at, cell, r + i); }, [&](int i) { return head_of(at, cell, r + i); },
                      at.value_scale[cell % at.groups], out + row * at.size, codes + row * at.keys);
        }
      }
    };
    together(threads, job);
  }

 private:
  static int head_of(const Int8Attention& at, int cell, int row) {
    return cell % at.groups * (at.heads / at.groups) + row / at.queries;
  }

  static const std::uint8_t* masked(const Int8Attention& at, int cell, int row) {
    if (at.mask == nullptr) return nullptr;
    return at.mask + cell / at.groups * at.mask_batch + head_of(at, cell, row) * at.mask_head + row % at.queries * at.mask_query;
  }
};

}  // namespace
}  // namespace qtool
