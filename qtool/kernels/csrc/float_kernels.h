// The table of float kernels of one instruction set.

#pragma once

#include "float_encoder.h"

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
      crew.wait();
      Product(linear, parts.codes, parts.scales, rows, parts.unpacked + crew.index * Product::unpacked_bytes(linear, rows))
          .run(crew.begin(groups), crew.end(groups), Target<float>{out, linear.outputs},
               [](auto isa, float* cell, auto y) { decltype(isa)::store_float(cell, y); });
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

  static constexpr FloatKernels table() { return {&linear_bytes, &linear, &encoder_bytes, &encoder}; }

 private:
  using Product = FloatProduct<Isa>;

  struct Parts {
    std::uint8_t* codes;
    float* scales;
    std::int8_t* unpacked;
  };

  static Parts cut(const QLinear& linear, int rows, int threads, Cutter& cutter) {
    Parts parts;
    parts.codes = cutter.take<std::uint8_t>(std::int64_t{rows} * Product::stride(linear));
    parts.scales = cutter.take<float>(rows);
    parts.unpacked = cutter.take<std::int8_t>(threads * Product::unpacked_bytes(linear, rows));
    return parts;
  }
};

}  // namespace
}  // namespace qtool
