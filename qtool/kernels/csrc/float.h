// What the kernels of float models with int8 weights are given: plain structs that structs.py mirrors field by field.

#pragma once

#include <cstdint>

#include "integer.h"

namespace qtool {

// QLinear. `weight` is tiled int8, or with `nibbles` tiles of two codes a byte; `row_sums` (int32), `scale` and `offset`
// are [column_blocks, outputs]. A block has `width` inputs, a multiple of 4 where there are several; the last may be
// shorter. `bias`, `act_scale` and `offset` may be null: no bias, a scale for every token, symmetric weights.
struct QLinear {
  const void* weight;
  const std::int32_t* row_sums;
  const float *scale, *bias, *act_scale, *offset;
  std::int32_t inputs, outputs, column_blocks, width, nibbles;
};

enum CodeLayout : std::int32_t { kCodeTiles = 0, kCodeNibbles = 1, kCodeRows = 2 };

// Float rows by integer weights. `weight` is tiled int8, tiles of two codes a byte, or int8 row after row, by `layout`. `scale`
// and `offset` are [row blocks, column blocks] of `block_rows` outputs and `width` inputs, as in QLinear; rows have one column
// block and no offset. `offset` and `bias` may be null.
struct CodeLinear {
  const void* weight;
  const float *scale, *offset, *bias;
  std::int32_t inputs, outputs, block_rows, column_blocks, width, layout;
};

struct Norm {
  const float *weight, *bias;
  float eps;
  std::int32_t size;
};

enum FloatActivation : std::int32_t { kGelu = 0, kFloatRelu = 1 };

// What `query` gives may be narrower than the residual stream: as many heads as it has room for. Without any (0 outputs),
// attention is the bias of `output` alone, and neither has weights.
struct QBlock {
  QLinear query, key, value, output;
  Norm attention_norm;
  QLinear up, down;
  Norm ffn_norm;
};

// Heads have `size` channels each.
struct QEncoder {
  const QBlock* blocks;
  std::int32_t count, hidden, size, activation;
};

struct RmsNorm {
  const float* weight;
  float eps;
  std::int32_t size;
};

// A linear of a decoder: with `is_float`, float rows by the codes of `codes`, else codes of rows by those of `quantized`.
struct DecoderLinear {
  QLinear quantized;
  CodeLinear codes;
  std::int32_t is_float;
};

enum GateActivation : std::int32_t { kSilu = 0, kGeluGate = 1 };

// A pre-norm block up to its attention: heads of queries, and of keys and values (`groups`), of `size` channels each.
struct DecoderFront {
  DecoderLinear query, key, value;
  RmsNorm norm;
  std::int32_t heads, groups, size;
};

// The rest of it, with a gated feed-forward part.
struct DecoderBack {
  DecoderLinear output, gate, up, down;
  RmsNorm norm;
  std::int32_t activation;
};

// Cosines and sines by which queries and keys are turned, [count][size]; row r takes those of r % count.
struct Rotation {
  const float *cosine, *sine;
  std::int32_t count;
};

// Codes of queries [batch][groups][heads / groups * queries][size], keys and values [batch][groups][keys][size] and what a
// code is worth: of a row of queries (with the scale of the scores, in octaves), of a key, of the values of a group. `mask`
// is null, or bytes of which a row is `mask_batch`, `mask_head` and `mask_query` further for the next of those. With edges in
// `book`, weights are its codes; `level_unit` [heads] is what a level is worth, null where that does not matter.
struct Int8Attention {
  const std::int8_t *query, *key, *value;
  const float *unit, *key_unit, *value_scale;
  const std::uint8_t* mask;
  std::int64_t mask_batch, mask_head, mask_query;
  std::int32_t batch, heads, groups, queries, keys, size;
  WholeCodebook book;
  const float* level_unit;
};

// One query of each of `heads`, keys and values of `groups`, with distances in elements between sequences, heads and
// tokens; channels lie side by side. `mask` is null, or bytes of what is seen, those of a head side by side.
struct WideAttention {
  const float *query, *key, *value;
  const std::uint8_t* mask;
  std::int64_t query_batch, query_head, key_batch, key_head, key_token, value_batch, value_head, value_token, mask_batch, mask_head;
  double scaling;
  std::int32_t batch, heads, groups, keys, size;
};

struct FloatKernels {
  std::int64_t (*linear_bytes)(const QLinear&, int rows, int threads);
  void (*linear)(const QLinear&, const float* x, int rows, float* out, int threads, void* memory);
  std::int64_t (*code_linear_bytes)(const CodeLinear&, int rows, int threads);
  void (*code_linear)(const CodeLinear&, const float* x, int rows, float* out, int threads, void* memory);
  std::int64_t (*encoder_bytes)(const QEncoder&, const std::int32_t* starts, int sequences, int threads);
  // x float32 [tokens, hidden], in place; sequence i has rows starts[i] ... starts[i + 1] - 1.
  void (*encoder)(const QEncoder&, float* x, const std::int32_t* starts, int sequences, int threads, void* memory);
  std::int64_t (*decoder_front_bytes)(const DecoderFront&, int rows, int threads);
  // x [rows][hidden] → out [rows][heads + 2 groups][size]: queries and keys, turned, and values.
  void (*decoder_front)(const DecoderFront&, const Rotation&, const float* x, int rows, float* out, int threads, void* memory);
  std::int64_t (*decoder_back_bytes)(const DecoderBack&, int rows, int threads);
  // context [rows][heads * size] and what went into the front, x [rows][hidden] → out [rows][hidden], another array.
  void (*decoder_back)(const DecoderBack&, const float* context, const float* x, int rows, float* out, int threads, void* memory);
  std::int64_t (*attention_bytes)(const Int8Attention&);
  // out float32 [batch][groups][heads / groups * queries][size], codes uint8 [...][keys]; `memory` is as much for each thread.
  void (*attention)(const Int8Attention&, float* out, std::uint8_t* codes, int threads, void* memory);
  std::int64_t (*wide_attention_bytes)(const WideAttention&);
  // out float32 [batch][heads][size]; `memory` is as much for each thread.
  void (*wide_attention)(const WideAttention&, float* out, int threads, void* memory);
};

extern const FloatKernels kFloatPortable, kFloatAvx2, kFloatAvx512Vnni;

}  // namespace qtool
