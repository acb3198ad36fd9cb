// The flat C interface of the native library: plain integers, pointers and structs, loaded by native.py with ctypes.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

#include "cpu.h"
#include "float.h"
#include "integer.h"
#include "team.h"

#if defined(_WIN32)
#define QTOOL_EXPORT extern "C" __declspec(dllexport)
#else
#define QTOOL_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace qtool {
namespace {

// Raised with every incompatible change of an exported function or struct; native.py refuses a library of another number.
constexpr std::int32_t kAbiVersion = 8;

// What functions return.
enum Status : std::int32_t { kFine = 0, kNoMemory = 1, kBadId = 2 };

// In this order the index by which native.py names an instruction set.
constexpr int kPortableIsa = 0, kAvx2Isa = 1, kAvx512VnniIsa = 2, kIsas = 3;

bool runs(int isa) {
  const auto has = [](std::uint64_t mask) { return (cpu_features() & mask) == mask; };
  switch (isa) {
    case kPortableIsa:
      return true;
    case kAvx2Isa:
      return has(kAvx2 | kFma);
    case kAvx512VnniIsa:
      return has(kAvx512F | kAvx512Bw | kAvx512Dq | kAvx512Vl | kAvx512Vnni);
  }
  return false;
}

const IntegerKernels& integer(int isa) {
#if defined(__x86_64__) || defined(_M_X64)
  if (isa == kAvx512VnniIsa) return kIntegerAvx512Vnni;
  if (isa == kAvx2Isa) return kIntegerAvx2;
#endif
  return kIntegerPortable;
}

const FloatKernels& floating(int isa) {
#if defined(__x86_64__) || defined(_M_X64)
  if (isa == kAvx512VnniIsa) return kFloatAvx512Vnni;
  if (isa == kAvx2Isa) return kFloatAvx2;
#endif
  return kFloatPortable;
}

// Memory of one call. The largest block that was given back is kept: fresh pages for every call would cost more than some
// calls do. There is no lock, which a child of fork might find taken.
class Memory {
 public:
  explicit Memory(std::int64_t bytes) : block_(kept_.exchange(nullptr)) {
    if (block_ != nullptr && block_->bytes >= bytes) return;
    free(block_);
    void* fresh = ::operator new(sizeof(Block) + static_cast<std::size_t>(bytes), std::align_val_t{64}, std::nothrow);
    block_ = fresh == nullptr ? nullptr : new (fresh) Block{bytes};
  }
  ~Memory() {
    if (block_ == nullptr) return;
    Block* other = kept_.exchange(nullptr);
    if (other != nullptr && other->bytes > block_->bytes) std::swap(other, block_);
    free(other);
    free(kept_.exchange(block_));  // given back by another thread in between
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  void* get() const { return block_ == nullptr ? nullptr : block_ + 1; }

 private:
  struct alignas(64) Block {
    std::int64_t bytes;  // behind it
  };
  static void free(Block* block) { ::operator delete(block, std::align_val_t{64}); }

  static inline std::atomic<Block*> kept_{nullptr};

  Block* block_;
};

bool ids_fit(const IntEncoder& encoder, const IntBatch& batch) {
  for (int t = 0; t < kTables; ++t) {
    if (encoder.tables[t].weight == nullptr) continue;
    for (int i = 0; i < batch.tokens; ++i) {
      const std::int64_t id = batch.ids[t][i];
      if (id < 0 || id >= encoder.tables[t].rows) return false;
    }
  }
  return true;
}

}  // namespace
}  // namespace qtool

using namespace qtool;

QTOOL_EXPORT std::int32_t qtool_abi_version() { return kAbiVersion; }

QTOOL_EXPORT std::uint64_t qtool_cpu_features() { return cpu_features(); }

// Bit i: whether instruction set i was built and runs here.
QTOOL_EXPORT std::uint32_t qtool_isas() {
  std::uint32_t found = 0;
  for (int isa = 0; isa < kIsas; ++isa) found |= static_cast<std::uint32_t>(runs(isa)) << isa;
  return found;
}

// To be called where this process was forked before it loaded the library.
QTOOL_EXPORT void qtool_after_fork() { after_fork(); }

QTOOL_EXPORT std::int32_t qtool_code_offset(std::int32_t isa) { return integer(isa).code_offset; }

// Sums of the codes of each output over each block of `width` inputs, int32 [blocks][outputs], from tiles of int8 or of two
// codes a byte. A width is a multiple of 4, or all inputs; the last block may be shorter.
QTOOL_EXPORT std::int32_t qtool_row_sums(std::int32_t, const void* tiles, std::int32_t nibbles, std::int32_t outputs,
                                         std::int32_t inputs, std::int32_t width, std::int32_t* sums) {
  constexpr int kTileRows = 16, kTileColumns = 4;
  const int steps = (inputs + kTileColumns - 1) / kTileColumns, each = (width + kTileColumns - 1) / kTileColumns;
  const int blocks = each < steps ? (steps + each - 1) / each : 1;
  const auto* bytes = static_cast<const std::uint8_t*>(tiles);
  for (int c = 0; c < outputs; ++c) {
    for (int block = 0; block < blocks; ++block) {
      std::int32_t sum = 0;
      for (int k = block * each; k < std::min((block + 1) * each, steps); ++k) {
        const std::int64_t tile = (std::int64_t{c / kTileRows} * steps + k) * kTileRows + c % kTileRows;
        for (int i = 0; i < kTileColumns; ++i) {
          if (nibbles != 0) {
            const int byte = bytes[tile * 2 + i / 2];
            sum += ((i % 2 == 0 ? byte & 15 : byte >> 4) ^ 8) - 8;
          } else {
            sum += static_cast<std::int8_t>(bytes[tile * 4 + i]);
          }
        }
      }
      sums[std::int64_t{block} * outputs + c] = sum;
    }
  }
  return kFine;
}

QTOOL_EXPORT std::int32_t qtool_integer_encoder(std::int32_t isa, const IntEncoder* encoder, const IntBatch* batch, std::int32_t* out,
                                                std::int32_t threads) {
  if (!ids_fit(*encoder, *batch)) return kBadId;
  const Memory memory(integer(isa).encoder_bytes(*encoder, *batch, threads));
  if (memory.get() == nullptr) return kNoMemory;
  integer(isa).encoder(*encoder, *batch, out, threads, memory.get());
  return kFine;
}

QTOOL_EXPORT std::int32_t qtool_quantize_rows(std::int32_t isa, const std::int32_t* x, std::int32_t rows, std::int32_t width,
                                              std::int32_t is_unsigned, std::int8_t* codes, std::int64_t* amax, std::int32_t threads) {
  integer(isa).quantize_rows(x, rows, width, is_unsigned != 0, codes, amax, threads);
  return kFine;
}

QTOOL_EXPORT std::int32_t qtool_integer_linear(std::int32_t isa, const IntLinear* linear, const std::int8_t* codes,
                                               const std::int64_t* amax, std::int32_t rows, std::int32_t* out, std::int32_t threads) {
  const Memory memory(integer(isa).linear_bytes(*linear, rows));
  if (memory.get() == nullptr) return kNoMemory;
  integer(isa).linear(*linear, codes, amax, rows, out, threads, memory.get());
  return kFine;
}

QTOOL_EXPORT std::int32_t qtool_integer_norm(std::int32_t isa, const IntNorm* norm, const std::int32_t* x, std::int32_t rows,
                                             std::int32_t* out, std::int32_t threads) {
  integer(isa).norm(*norm, x, rows, out, threads);
  return kFine;
}

QTOOL_EXPORT std::int32_t qtool_integer_attention(std::int32_t isa, const IntAttention* attention, const std::int32_t* query,
                                                  const std::int8_t* key, const std::int8_t* value, const std::int32_t* keys,
                                                  const std::int32_t* starts, std::int32_t batch, std::int32_t tokens,
                                                  std::int32_t* out, std::int32_t threads) {
  const Memory memory(integer(isa).attention_bytes(*attention, tokens) * threads);
  if (memory.get() == nullptr) return kNoMemory;
  integer(isa).attention(*attention, query, key, value, keys, starts, batch, tokens, out, threads, memory.get());
  return kFine;
}

QTOOL_EXPORT std::int32_t qtool_float_linear(std::int32_t isa, const QLinear* linear, const float* x, std::int32_t rows, float* out,
                                             std::int32_t threads) {
  const Memory memory(floating(isa).linear_bytes(*linear, rows, threads));
  if (memory.get() == nullptr) return kNoMemory;
  floating(isa).linear(*linear, x, rows, out, threads, memory.get());
  return kFine;
}

QTOOL_EXPORT std::int32_t qtool_code_linear(std::int32_t isa, const CodeLinear* linear, const float* x, std::int32_t rows, float* out,
                                            std::int32_t threads) {
  const Memory memory(floating(isa).code_linear_bytes(*linear, rows, threads));
  if (memory.get() == nullptr) return kNoMemory;
  floating(isa).code_linear(*linear, x, rows, out, threads, memory.get());
  return kFine;
}

QTOOL_EXPORT std::int32_t qtool_float_encoder(std::int32_t isa, const QEncoder* encoder, float* x, const std::int32_t* starts,
                                              std::int32_t sequences, std::int32_t threads) {
  const Memory memory(floating(isa).encoder_bytes(*encoder, starts, sequences, threads));
  if (memory.get() == nullptr) return kNoMemory;
  floating(isa).encoder(*encoder, x, starts, sequences, threads, memory.get());
  return kFine;
}

QTOOL_EXPORT std::int32_t qtool_decoder_front(std::int32_t isa, const DecoderFront* front, const Rotation* rotation,
                                              const float* x, std::int32_t rows, float* out, std::int32_t threads) {
  const Memory memory(floating(isa).decoder_front_bytes(*front, rows, threads));
  if (memory.get() == nullptr) return kNoMemory;
  floating(isa).decoder_front(*front, *rotation, x, rows, out, threads, memory.get());
  return kFine;
}

QTOOL_EXPORT std::int32_t qtool_decoder_back(std::int32_t isa, const DecoderBack* back, const float* context, const float* x,
                                             std::int32_t rows, float* out, std::int32_t threads) {
  const Memory memory(floating(isa).decoder_back_bytes(*back, rows, threads));
  if (memory.get() == nullptr) return kNoMemory;
  floating(isa).decoder_back(*back, context, x, rows, out, threads, memory.get());
  return kFine;
}

QTOOL_EXPORT std::int32_t qtool_int8_attention(std::int32_t isa, const Int8Attention* attention, float* out, std::uint8_t* codes,
                                               std::int32_t threads) {
  const Memory memory(floating(isa).attention_bytes(*attention) * threads);
  if (memory.get() == nullptr) return kNoMemory;
  floating(isa).attention(*attention, out, codes, threads, memory.get());
  return kFine;
}

QTOOL_EXPORT std::int32_t qtool_wide_attention(std::int32_t isa, const WideAttention* attention, float* out, std::int32_t threads) {
  const Memory memory(floating(isa).wide_attention_bytes(*attention) * threads);
  if (memory.get() == nullptr) return kNoMemory;
  floating(isa).wide_attention(*attention, out, threads, memory.get());
  return kFine;
}

// Nanoseconds of `iterations` rounds of multiply-adds in registers; `products` gets how many those were.
QTOOL_EXPORT std::int64_t qtool_time_peak(std::int32_t isa, std::int64_t iterations, std::int64_t* products) {
  *products = iterations * integer(isa).spin_products;
  const auto start = std::chrono::steady_clock::now();
  volatile std::int32_t sum = integer(isa).spin(iterations);
  (void)sum;
  return std::chrono::nanoseconds(std::chrono::steady_clock::now() - start).count();
}

// Nanoseconds of `repeats` products of `a`, uint8 [rows][inputs], by tiled weights, on this thread.
QTOOL_EXPORT std::int64_t qtool_time_product(std::int32_t isa, const std::uint8_t* a, const std::int8_t* w, std::int32_t rows,
                                             std::int32_t inputs, std::int32_t outputs, std::int32_t* out, std::int32_t repeats) {
  const auto start = std::chrono::steady_clock::now();
  for (std::int32_t i = 0; i < repeats; ++i) integer(isa).product(a, w, rows, inputs, outputs, out);
  return std::chrono::nanoseconds(std::chrono::steady_clock::now() - start).count();
}
