// A pre-norm decoder block with integer weights in two calls, before and after its attention, float in between.

#pragma once

#include <initializer_list>
#include <vector>

#include "code_linear.h"
#include "float_product.h"

namespace qtool {
namespace {

template <class Isa>
class DecoderRows {
 public:
  DecoderRows(const DecoderFront& front, int rows, int threads, void* memory)
      : DecoderRows({&front.query, &front.key, &front.value}, front.norm.size, 0, rows, threads, memory) {}

  DecoderRows(const DecoderBack& back, int rows, int threads, void* memory)
      : DecoderRows({&back.output, &back.gate, &back.up, &back.down}, back.norm.size, outputs(back.up), rows, threads, memory) {}

  template <class Half>
  static std::int64_t bytes(const Half& half, int rows, int threads) {
    return DecoderRows(half, rows, threads, nullptr).used_;
  }

  void before_attention(const Crew& crew, const DecoderFront& front, const Rotation& rotation, const float* x, float* out) {
    const int width = (front.heads + 2 * front.groups) * front.size, turned = front.heads + front.groups;
    by_rows(crew, [&](Rows& rows) {
      float* const first = out + std::int64_t{rows.begin} * width;
      normalize(rows, front.norm, x + std::int64_t{rows.begin} * front.norm.size);
      int column = 0;
      for (const DecoderLinear* linear : {&front.query, &front.key, &front.value}) {
        multiply_normal(rows, *linear, {first + column, width}, [](auto isa, float* cell, auto y) { decltype(isa)::store_float(cell, y); });
        column += outputs(*linear);
      }
      rows.crew.wait();
      const int heads = rows.count * turned;
      for (int i = rows.crew.begin(heads); i < rows.crew.end(heads); ++i) {
        const std::int64_t angle = std::int64_t{(rows.begin + i / turned) % rotation.count} * front.size;
        float* const head = first + std::int64_t{i / turned} * width + i % turned * front.size;
        rotate_head<Isa>(head, rotation.cosine + angle, rotation.sine + angle, front.size);
      }
    });
  }

  void after_attention(const Crew& crew, const DecoderBack& back, const float* context, const float* x, float* out) {
    const int hidden = back.norm.size, inner = outputs(back.up);
    by_rows(crew, [&](Rows& rows) {
      const std::int64_t begin = std::int64_t{rows.begin} * hidden;
      const float* const before = x + begin;
      float* const after = out + begin;
      multiply_rows(rows, back.output, context + std::int64_t{rows.begin} * inputs(back.output), {after, hidden},
                    [before, after](auto isa, float* cell, auto y) {
                      using V = decltype(isa);
                      V::store_float(cell, V::add_float(V::load_float(before + (cell - after)), y));
                    });
      rows.crew.wait();
      normalize(rows, back.norm, after);
      feed(rows, back, {rows.inner, inner});
      rows.crew.wait();
      multiply_rows(rows, back.down, rows.inner, {after, hidden}, [](auto isa, float* cell, auto y) {
        using V = decltype(isa);
        V::store_float(cell, V::add_float(V::load_float(cell), y));
      });
    });
  }

 private:
  using Product = FloatProduct<Isa>;

  // So few rows that every thread makes all codes for itself takes less time than waiting for those of others.
  static constexpr int kOwnRows = 4;

  // What a step of some rows needs: of the thread that owns the rows, and (`unpacked`, `room`) of each one.
  struct Worker {
    std::uint8_t* codes;
    float* scales;
    std::int32_t* sums;
    float *normal, *inner, *room;
    std::int8_t* unpacked;
  };

  // Rows that a crew takes through half a block. `makers` are those of it that share the steps that go by rows: the crew,
  // or each thread by itself. `coded` is the linear for which codes were made last, of the present numbers.
  struct Rows {
    const Crew &crew, &makers;
    const Worker &scratch, &own;
    float* inner;
    int begin, count;
    const DecoderLinear* coded = nullptr;
  };

  DecoderRows(std::initializer_list<const DecoderLinear*> linears, int hidden, int inner, int rows, int threads, void* memory)
      : starts_{0, rows}, schedule_(starts_, 1, 1, 1, threads, std::max(Isa::kRows, Isa::kFloatRows)), rows_(rows),
        is_shared_(schedule_.is_together() && rows > kOwnRows) {
    std::int64_t stride = 0, blocks = 0, unpacked = 0, room = 0;
    for (const DecoderLinear* linear : linears) {
      const QLinear& codes = linear->quantized;
      if (linear->is_float) {
        room = std::max(room, CodeProduct<Isa>::room(linear->codes, rows));
      } else {
        stride = std::max<std::int64_t>(stride, Product::stride(codes));
        blocks = std::max<std::int64_t>(blocks, codes.offset != nullptr ? codes.column_blocks : 0);
        unpacked = std::max(unpacked, Product::unpacked_bytes(codes, schedule_.rows_of(0)));
      }
    }
    Cutter cutter(memory);
    for (int t = 0; t < threads; ++t) {
      const std::int64_t held = schedule_.is_together() && !is_shared_ ? rows : schedule_.rows_of(t);
      Worker worker;
      worker.codes = cutter.take<std::uint8_t>(held * stride);
      worker.scales = cutter.take<float>(held);
      worker.sums = cutter.take<std::int32_t>(held * blocks);
      worker.normal = cutter.take<float>(held * hidden);
      worker.inner = cutter.take<float>(std::int64_t{schedule_.rows_of(t)} * inner);
      worker.room = cutter.take<float>(room);
      worker.unpacked = cutter.take<std::int8_t>(unpacked);
      workers_.push_back(worker);
    }
    used_ = cutter.used();
  }
  // Its schedule points into it.
  DecoderRows(const DecoderRows&) = delete;
  DecoderRows& operator=(const DecoderRows&) = delete;

  static int outputs(const DecoderLinear& linear) { return linear.is_float ? linear.codes.outputs : linear.quantized.outputs; }
  static int inputs(const DecoderLinear& linear) { return linear.is_float ? linear.codes.inputs : linear.quantized.inputs; }

  template <class Work>
  void by_rows(const Crew& crew, const Work& work) {
    const Crew alone;
    schedule_.by_rows(crew, 0, [&](const Crew& some, int owner, int begin, int end) {
      const Worker &first = workers_[owner], &own = workers_[owner + some.index];
      Rows rows = {some, is_shared_ ? some : alone, is_shared_ ? first : own, own, first.inner, begin, end - begin};
      work(rows);
    });
  }

  // RMSNorm of x into what `multiply_normal` multiplies.
  static void normalize(Rows& rows, const RmsNorm& norm, const float* x) {
    for (int r = rows.makers.begin(rows.count); r < rows.makers.end(rows.count); ++r) {
      rms_norm_row<Isa>(norm, x + std::int64_t{r} * norm.size, rows.scratch.normal + std::int64_t{r} * norm.size);
    }
    rows.makers.wait();
    rows.coded = nullptr;
  }

  // inner = activation(gate) * up
  void feed(Rows& rows, const DecoderBack& back, const Target<float>& inner) const {
    multiply_normal(rows, back.gate, inner, [](auto isa, float* cell, auto y) { decltype(isa)::store_float(cell, y); });
    if (back.gate.is_float != back.up.is_float) rows.crew.wait();  // else each thread has the outputs that it had
    const bool gelus = back.activation == kGeluGate;
    multiply_normal(rows, back.up, inner, [gelus](auto isa, float* cell, auto y) {
      using V = decltype(isa);
      const auto gate = V::load_float(cell);
      V::store_float(cell, V::mul_float(gelus ? gelu<V>(gate) : silu<V>(gate), y));
    });
  }

  template <class Store>
  void multiply_rows(Rows& rows, const DecoderLinear& linear, const float* x, const Target<float>& target, const Store& store) const {
    rows.coded = nullptr;
    encode(rows, linear, x);
    product(rows, linear, x, target, store);
  }

  // The same of what `normalize` left; codes that were made for another linear are used again.
  template <class Store>
  void multiply_normal(Rows& rows, const DecoderLinear& linear, const Target<float>& target, const Store& store) const {
    if (rows.coded != nullptr && (!same_codes(*rows.coded, linear) || linear.quantized.offset != nullptr)) rows.makers.wait();
    encode(rows, linear, rows.scratch.normal);
    product(rows, linear, rows.scratch.normal, target, store);
  }

  // Whether codes of rows that serve one linear serve another.
  static bool same_codes(const DecoderLinear& one, const DecoderLinear& other) {
    if (other.is_float) return true;
    const float *a = one.quantized.act_scale, *b = other.quantized.act_scale;
    return a == b || (a != nullptr && b != nullptr && *a == *b);
  }

  // Codes of x where there are none that serve, and their sums where `linear` has offsets.
  static void encode(Rows& rows, const DecoderLinear& linear, const float* x) {
    if (linear.is_float) return;
    const QLinear& quantized = linear.quantized;
    const Worker& scratch = rows.scratch;
    const bool fresh = rows.coded == nullptr || !same_codes(*rows.coded, linear);
    if (fresh) quantize_rows<Isa>(rows.makers, quantized, x, rows.count, scratch.codes, scratch.scales);
    if (quantized.offset != nullptr) {
      for (int r = rows.makers.begin(rows.count); r < rows.makers.end(rows.count); ++r) {
        add_codes<Isa>(quantized, scratch.codes + std::int64_t{r} * Product::stride(quantized),
                       scratch.sums + std::int64_t{r} * quantized.column_blocks);
      }
    }
    if (fresh || quantized.offset != nullptr) rows.makers.wait();
    rows.coded = &linear;
  }

  template <class Store>
  void product(const Rows& rows, const DecoderLinear& linear, const float* x, const Target<float>& target, const Store& store) const {
    if (linear.is_float) {
      CodeProduct<Isa>(linear.codes, x, rows.count, rows_, rows.own.room).run(rows.crew, target, store);
      return;
    }
    const int groups = Product::groups(linear.quantized);
    Product(linear.quantized, rows.scratch.codes, rows.scratch.scales, rows.count, rows.own.unpacked, rows.scratch.sums)
        .run(rows.crew.begin(groups), rows.crew.end(groups), target, store);
  }

  const std::int32_t starts_[2];
  Schedule schedule_;
  int rows_;
  bool is_shared_;
  std::int64_t used_ = 0;
  std::vector<Worker> workers_;
};

}  // namespace
}  // namespace qtool
