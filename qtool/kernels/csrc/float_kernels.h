// The table of float kernels of one instruction set.

#pragma once

#include "code_attention.h"
#include "code_linear.h"
#include "float_decoder.h"
#include "float_encoder.h"
#include "wide_attention.h"

namespace qtool {
namespace {

template <class Isa>
struct FloatTable {
  static std::int64_t linear_bytes(const QLinear& linear, int rows, int threads) {
    Cutter cutter(nullptr);
    cut(linear, rows, threads, cutter);
    return cutter.used();
  }

  static void linear(const QLinear& linear, const float* x, int rows, float* out, int threads, void* memory) {
    Cutter cutter(memory);
    const Parts parts = cut(linear, rows, threads, cutter);
    const int groups = Product::groups(linear);
    auto job = [&](const Crew& crew) {
      quantize_rows<Isa>(crew, linear, x, rows, parts.codes, parts.scales);
      if (linear.offset != nullptr) {
        for (int r = crew.begin(rows); r < crew.end(rows); ++r) {
          add_codes<Isa>(linear, parts.codes + std::int64_t{r} * Product::stride(linear), parts.code_sums + std::int64_t{r} * linear.column_blocks);
        }
      }
      crew.wait();
      std::int8_t* unpacked = parts.unpacked + crew.index * Product::unpacked_bytes(linear, rows);
      Product(linear, parts.codes, parts.scales, rows, unpacked, parts.code_sums)
          .run(crew.begin(groups), crew.end(groups), Target<float>{out, linear.outputs},
               [](auto isa, float* cell, auto y) { decltype(isa)::store_float(cell, y); });
    };
    together(threads, job);
  }

  static std::int64_t code_linear_bytes(const CodeLinear& linear, int rows, int threads) {
    Cutter cutter(nullptr);
    cutter.take<float>(threads * CodeProduct<Isa>::room(linear, rows));
    return cutter.used();
  }

  static void code_linear(const CodeLinear& linear, const float* x, int rows, float* out, int threads, void* memory) {
    const std::int64_t room = CodeProduct<Isa>::room(linear, rows);
    float* const own = Cutter(memory).take<float>(threads * room);
    auto job = [&](const Crew& crew) {
      CodeProduct<Isa>(linear, x, rows, rows, own + crew.index * room).run(crew, Target<float>{out, linear.outputs}, [](auto isa, float* cell, auto y) {
        decltype(isa)::store_float(cell, y);
      });
    };
    together(threads, job);
  }

  static std::int64_t encoder_bytes(const QEncoder& encoder, const std::int32_t* starts, int sequences, int threads) {
    return FloatEncoder<Isa>::bytes(encoder, starts, sequences, threads);
  }

  static void encoder(const QEncoder& encoder, float* x, const std::int32_t* starts, int sequences, int threads, void* memory) {
    FloatEncoder<Isa> work(encoder, x, starts, sequences, threads, memory);
    auto job = [&](const Crew& crew) { work.run(crew); };
    together(threads, job);
  }

  static std::int64_t decoder_front_bytes(const DecoderFront& front, int rows, int threads) {
    return DecoderRows<Isa>::bytes(front, rows, threads);
  }

  static void decoder_front(const DecoderFront& front, const Rotation& rotation, const float* x, int rows, float* out, int threads, void* memory) {
    DecoderRows<Isa> work(front, rows, threads, memory);
    auto job = [&](const Crew& crew) { work.before_attention(crew, front, rotation, x, out); };
    together(threads, job);
  }

  static std::int64_t decoder_back_bytes(const DecoderBack& back, int rows, int threads) {
    return DecoderRows<Isa>::bytes(back, rows, threads);
  }

  static void decoder_back(const DecoderBack& back, const float* context, const float* x, int rows, float* out, int threads, void* memory) {
    DecoderRows<Isa> work(back, rows, threads, memory);
    auto job = [&](const Crew& crew) { work.after_attention(crew, back, context, x, out); };
    together(threads, job);
  }

  static constexpr FloatKernels table() {
    return {&linear_bytes,  &linear,        &code_linear_bytes,  &code_linear,  &encoder_bytes,            &encoder,
            &decoder_front_bytes, &decoder_front, &decoder_back_bytes, &decoder_back, &CodeAttention<Isa>::bytes, &CodeAttention<Isa>::run,
            &WideHeads::bytes, &WideHeads::run};
  }

 private:
  using Product = FloatProduct<Isa>;

  struct Parts {
    std::uint8_t* codes;
    float* scales;
    std::int32_t* code_sums;  // [rows, column blocks], for weights with offsets
    std::int8_t* unpacked;
  };

  static Parts cut(const QLinear& linear, int rows, int threads, Cutter& cutter) {
    Parts parts;
    parts.codes = cutter.take<std::uint8_t>(std::int64_t{rows} * Product::stride(linear));
    parts.scales = cutter.take<float>(rows);
    parts.code_sums = cutter.take<std::int32_t>(linear.offset != nullptr ? std::int64_t{rows} * linear.column_blocks : 0);
    parts.unpacked = cutter.take<std::int8_t>(threads * Product::unpacked_bytes(linear, rows));
    return parts;
  }
};

}  // namespace
}  // namespace qtool
