// What the integer kernels are given: plain structs that native.py mirrors field by field. All arrays belong to the caller.

#pragma once

#include <cstdint>

#include "team.h"

namespace qtool {

// IntLinear. `weight` is tiled; `correction` is what offsets of codes put into the sums of each output, or null.
struct IntLinear {
  const std::int8_t* weight;
  const std::int32_t *correction, *bias, *multiplier, *shift;
  const std::int32_t *in_multiplier, *in_shift, *in_offset;  // null: the input is taken as it is
  std::int32_t inputs, outputs, in_bits, out_bits, align, dynamic, is_unsigned;
};

struct IntNorm {
  const std::int32_t *weight, *shift, *bias;
  std::int64_t eps;
  std::int32_t size, out_bits;
};

enum ActivationKind : std::int32_t { kTable = 0, kPolynomial = 1, kRelu = 2 };

// IntTable, IntGelu, IntRelu. `table` has an entry more than there are inputs; `constants` are the polynomial's.
struct IntActivation {
  const std::int16_t* table;
  std::int64_t constants[4];
  std::int32_t kind, in_bits, multiplier, shift, shifted;
};

// WholeCodebook: `edges` are [heads][count], `levels` [heads][count + 1] or null; without edges probabilities are no codes.
struct WholeCodebook {
  const std::int32_t *edges, *levels;
  std::int32_t count, relative, renormalize;
};

struct IntAttention {
  const std::int32_t *score_multiplier, *score_shift;  // [heads]
  const std::int32_t *multiplier, *shift;              // [heads * size]
  std::int32_t heads, size, align, grid, bits, out_bits;
  std::int32_t exp_b, exp_c;
  WholeCodebook book;
};

struct IntBlock {
  IntLinear query, key, value;
  IntAttention attention;
  IntLinear output;
  IntNorm attention_norm;
  IntLinear up;
  IntActivation act;
  IntLinear down;
  IntNorm ffn_norm;
};

// IntTableRows; `bits` says whether codes are int8 or int16.
struct IntRows {
  const void* weight;
  const std::int32_t *multiplier, *shift;
  std::int32_t rows, bits;
};

constexpr int kTables = 3;

struct IntEncoder {
  IntRows tables[kTables];  // word, position, token type; weight null: absent
  IntNorm norm;
  IntLinear projection;  // weight null: none
  const IntBlock* blocks;
  std::int32_t count, hidden;
};

// A batch without its padding: `tokens` rows, of which sequence i has starts[i] ... starts[i + 1] - 1.
struct IntBatch {
  const std::int64_t* ids[kTables];
  const std::int32_t* starts;
  std::int32_t sequences, tokens;
};

// The same operations for every instruction set. Memory is the caller's: as much as the function of that name says, from
// a cache line's start.
struct IntegerKernels {
  // What a stored code of an activation is larger than the code.
  int code_offset;
  std::int64_t (*encoder_bytes)(const IntEncoder&, const IntBatch&, int threads);
  void (*encoder)(const IntEncoder&, const IntBatch&, std::int32_t* out, int threads, void* memory);
  void (*quantize_rows)(const std::int32_t* x, int rows, int width, bool is_unsigned, std::int8_t* codes, std::int64_t* amax,
                        int threads);
  std::int64_t (*linear_bytes)(const IntLinear&, int rows);
  void (*linear)(const IntLinear&, const std::int8_t* codes, const std::int64_t* amax, int rows, std::int32_t* out, int threads,
                 void* memory);
  void (*norm)(const IntNorm&, const std::int32_t* x, int rows, std::int32_t* out, int threads);
  std::int64_t (*attention_bytes)(const IntAttention&, int tokens);  // for each thread
  void (*attention)(const IntAttention&, const std::int32_t* query, const std::int8_t* key, const std::int8_t* value,
                    const std::int32_t* keys, const std::int32_t* starts, int batch, int tokens, std::int32_t* out, int threads,
                    void* memory);
  // For measurements: `iterations` times `spin_products` multiply-adds in registers, and the product alone; inputs are a multiple of 4, outputs of 16.
  std::int32_t (*spin)(std::int64_t iterations);
  int spin_products;
  void (*product)(const std::uint8_t* a, const std::int8_t* w, int rows, int inputs, int outputs, std::int32_t* out);
};

extern const IntegerKernels kIntegerPortable, kIntegerAvx2, kIntegerAvx512Vnni;

}  // namespace qtool
