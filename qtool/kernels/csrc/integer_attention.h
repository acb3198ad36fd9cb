// Attention of one head over the keys of one sequence, in integers (docs/math.md, 9).

#pragma once

#include <algorithm>

#include "code_rows.h"
#include "integer_rows.h"
#include "schedule.h"

namespace qtool {
namespace {  // compiled for each instruction set apart: no copy may serve another

template <class Isa>
struct Head {
  static constexpr int kRows = Isa::kRows;

  // Packed keys and values of up to `keys` keys, and what a block of query rows needs.
  Head(const IntAttention& attention, int keys, Cutter& cutter)
      : attention_(&attention), size_(attention.size), ladder_(cutter) {
    const std::int64_t padded = ceil_div(keys, kTile) * kTile, quads = ceil_div(size_, kQuad) * kQuad;
    const std::int64_t panels = ceil_div(size_, kTile) * kTile;
    keys_ = cutter.take<std::int8_t>(padded * quads);
    values_ = cutter.take<std::int8_t>(padded * panels);
    corrections_ = cutter.take<std::int32_t>(padded);
    scores_ = cutter.take<std::int32_t>(padded * kRows);
    digits_ = cutter.take<std::uint8_t>(padded * kRows * kDigits);
    query_ = cutter.take<std::uint8_t>(quads * kRows);
    context_ = cutter.take<std::int32_t>(panels * kRows);
  }

  // All layers have heads of one shape.
  void serve(const IntAttention& attention) { attention_ = &attention; }

  // Takes the keys and values over into tiles. `row(i)` is the index of key i; rows are `stride` apart.
  template <class Row>
  void pack(const std::int8_t* key, const std::int8_t* value, std::ptrdiff_t stride, int keys, const Row& row) {
    count_ = keys;
    padded_ = ceil_div(keys, kTile) * kTile;
    const int quads = ceil_div(size_, kQuad), key_quads = padded_ / kQuad, panels = ceil_div(size_, kTile);
    for (int j = 0; j < padded_; ++j) {
      std::int8_t* tile = keys_ + (j / kTile) * quads * 64 + (j % kTile) * kQuad;
      if (j >= keys) {
        for (int q = 0; q < quads; ++q) std::memset(tile + q * 64, 0, kQuad);
        corrections_[j] = 0;
        continue;
      }
      const std::int8_t* codes = key + row(j) * stride;
      std::int32_t sum = 0;
      for (int c = 0; c < size_; ++c) sum += codes[c];
      corrections_[j] = -Isa::kOffset * sum;
      for (int q = 0; q < size_ / kQuad; ++q) std::memcpy(tile + q * 64, codes + q * kQuad, kQuad);
      for (int c = size_ / kQuad * kQuad; c < quads * kQuad; ++c) tile[(c / kQuad) * 64 + c % kQuad] = c < size_ ? codes[c] : 0;
    }
    for (int q = 0; q < key_quads; ++q) {
      const std::int8_t* rows[kQuad];
      for (int i = 0; i < kQuad; ++i) rows[i] = q * kQuad + i < keys ? value + row(q * kQuad + i) * stride : nullptr;
      for (int p = 0; p < panels; ++p) {
        std::int8_t* tile = values_ + (std::ptrdiff_t{p} * key_quads + q) * 64;
        if (rows[kQuad - 1] != nullptr && (p + 1) * kTile <= size_) {
          interleave(rows, p * kTile, tile);
        } else {
          for (int c = 0; c < kTile; ++c) {
            for (int i = 0; i < kQuad; ++i) {
              tile[c * kQuad + i] = rows[i] != nullptr && p * kTile + c < size_ ? rows[i][p * kTile + c] : 0;
            }
          }
        }
      }
    }
  }

  // Context of `count` query rows of this head, at most kRows. `head` is its number; rows are `stride` apart. T is int16
  // where both have 16 bits, or int32.
  template <class T>
  void attend(int head, const T* query, std::ptrdiff_t stride, int count, T* out) {
    const IntAttention& at = *attention_;
    const int quads = ceil_div(size_, kQuad), width = quads * kQuad, channel = head * size_;
    const std::int32_t score_limit = limit_of(kScoreBits), limit = limit_of(at.out_bits);
    std::int32_t amax[kRows];
    for (int r = 0; r < count; ++r) {
      for (int c = size_; c < width; ++c) query_[r * width + c] = 0;
      amax[r] = quantize_row<Isa>(query + r * stride, size_, false, Isa::kOffset, query_ + r * width);
    }
    const auto m = Isa::set(at.score_multiplier[head]), s = Isa::set(at.score_shift[head]);
    multiply<Isa>(query_, width, count, keys_, quads * 64, quads, 0, padded_ / kTile, Near{},
                  [&](int, int rows, int column, const std::int32_t* sums, int columns) {
                    for (int i = 0; i < columns; i += Isa::kLanes) {
                      const typename Isa::Requantizer requantize(Isa::load(corrections_ + column + i), Isa::set(0), m, s, score_limit);
                      for (int r = 0; r < rows; ++r) {
                        Isa::put(scores_ + r * padded_ + column + i,
                                   requantize.scaled(Isa::load(sums + r * columns + i), amax[r], at.align));
                      }
                    }
                  });
    const int digits = digits_of(head);
    if (at.book.levels != nullptr) ladder_.serve(at.book.levels + head * (at.book.count + 1), at.book.count);
    Quotient quotients[kRows] = {};
    for (int r = 0; r < count; ++r) {
      std::int32_t* row = scores_ + r * padded_;
      for (int j = count_; j < padded_; ++j) row[j] = kNoScore;
      quotients[r] = weigh(head, row, Digits{digits_ + r * padded_, std::ptrdiff_t{kRows} * padded_, digits});
    }
    const int panels = ceil_div(size_, kTile);
    for (int d = digits - 1; d >= 0; --d) {
      multiply<Isa>(digits_ + std::ptrdiff_t{d} * kRows * padded_, padded_, count, values_, std::ptrdiff_t{padded_} * kTile,
                    padded_ / kQuad, 0, panels, Near{}, [&](int, int rows, int column, const std::int32_t* sums, int columns) {
                      for (int r = 0; r < rows; ++r) {
                        std::int32_t* context = context_ + r * panels * kTile + column;
                        for (int i = 0; i < columns; i += Isa::kLanes) {
                          auto total = Isa::load(sums + r * columns + i);
                          if (d + 1 < digits) total = Isa::add(total, Isa::shift_left(Isa::load(context + i), 7));
                          Isa::put(context + i, total);
                        }
                      }
                    });
    }
    for (int r = 0; r < count; ++r) {
      const Quotient quotient = quotients[r];
      sweep<Isa, Portable>(size_, [&](auto isa, int c) {
        using V = decltype(isa);
        auto x = V::load(context_ + r * panels * kTile + c);
        if (quotient.factor != 0) x = V::scale_clamp(x, quotient.factor, quotient.places, kInt32Limit);
        V::put(out + r * stride + c, V::rescale(x, V::load(at.multiplier + channel + c), V::load(at.shift + channel + c), limit));
      });
    }
  }

 private:
  static constexpr int kDigits = 3;  // of 7 bits, for probabilities of up to 16

  // How many digits what stands for a probability has: one is enough for levels up to 127.
  int digits_of(int head) const {
    const WholeCodebook& book = attention_->book;
    if (book.count == 0 || book.levels == nullptr) return ceil_div(attention_->bits, 7);
    const std::int32_t* levels = book.levels + head * (book.count + 1);
    return *std::max_element(levels, levels + book.count + 1) > 127 ? 2 : 1;
  }

  // From scores of a row to the digits of its probabilities, or of what its codes stand for. Returns what the context is
  // multiplied by; a factor of 0 is none.
  Quotient weigh(int head, std::int32_t* row, const Digits& digits) {
    const IntAttention& at = *attention_;
    const WholeCodebook& book = at.book;
    const std::int64_t largest = std::int64_t{at.exp_b} * at.exp_b + at.exp_c;
    const std::int32_t* edges = book.edges + std::ptrdiff_t{head} * book.count;
    const auto put = [&digits](int i, auto level, auto) { digits.put<Isa>(i, level); };
    if (book.levels != nullptr && book.relative != 0 && book.renormalize != 0) {  // nothing needs the sum of the weights
      ladder_.limit(edges, largest);
      return {ladder_.row(Weights<Isa>(at, row, padded_), padded_, put), at.bits};
    }
    const std::int64_t sum = weigh_row<Isa>(at, row, padded_), whole = book.relative != 0 ? largest : sum;
    if (book.levels == nullptr) {
      const std::int64_t kept = book.count > 0 ? prune_row<Isa>(row, padded_, least_weight(edges[0], whole)) : sum;
      share_row<Isa>(at, row, padded_, book.renormalize != 0 ? kept : sum, digits);
      return {};
    }
    ladder_.limit(edges, whole);
    const std::int64_t total = ladder_.row([row](int i) { return Isa::load(row + i); }, padded_, put);
    if (book.renormalize != 0) return {total, at.bits};
    return book.relative != 0 ? Quotient(sum < largest ? largest : sum, bit_length(static_cast<std::uint64_t>(largest)) + 7) : Quotient();
  }

  // Bytes c of four rows side by side, for 16 columns.
  static void interleave(const std::int8_t* const* rows, int column, std::int8_t* tile) {
    std::uint32_t quads[kTile];
    for (int c = 0; c < kTile; ++c) {
      const auto byte = [&](int i) { return std::uint32_t{static_cast<std::uint8_t>(rows[i][column + c])} << (8 * i); };
      quads[c] = byte(0) | byte(1) | byte(2) | byte(3);
    }
    std::memcpy(tile, quads, sizeof quads);
  }

  const IntAttention* attention_;
  int size_;
  Ladder<Isa> ladder_;
  int count_ = 0, padded_ = 0;
  std::int8_t *keys_, *values_;
  std::int32_t *corrections_, *scores_, *context_;
  std::uint8_t *digits_, *query_;
};

}  // namespace
}  // namespace qtool
