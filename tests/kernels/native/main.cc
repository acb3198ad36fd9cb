// Calls every kernel of every instruction set that this CPU runs, at sizes around the widths of vectors, tiles and blocks,
// with arrays that end where they must. Built with sanitizers and the Cutter of redzones.h by test_sanitized.py. Integers
// must be those of the portable kernels, floats close to them, and neither may depend on threads.
//
// Exits with 0 when all is well, 1 for a wrong number; a sanitizer ends it otherwise. `main isas` names the instruction
// sets; `main MISTAKE ISA` makes a mistake that a sanitizer must see.

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "cpu.h"
#include "float.h"
#include "integer.h"
#include "schedule.h"

namespace {

using namespace qtool;
using std::int16_t;
using std::int32_t;
using std::int64_t;
using std::int8_t;
using std::uint8_t;

struct Isa {
  const char* name;
  const IntegerKernels* integer;
  const FloatKernels* floating;
};

std::vector<Isa> isas() {
  std::vector<Isa> found = {{"portable", &kIntegerPortable, &kFloatPortable}};
#if defined(__x86_64__)
  const auto has = [](std::uint64_t mask) { return (cpu_features() & mask) == mask; };
  if (has(kAvx2 | kFma)) found.push_back({"avx2", &kIntegerAvx2, &kFloatAvx2});
  if (has(kAvx512F | kAvx512Bw | kAvx512Dq | kAvx512Vl | kAvx512Vnni)) {
    found.push_back({"avx512vnni", &kIntegerAvx512Vnni, &kFloatAvx512Vnni});
  }
#endif
  return found;
}

// xorshift64*: the same numbers everywhere.
class Draw {
 public:
  explicit Draw(std::uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}

  std::uint64_t next() {
    state_ ^= state_ >> 12, state_ ^= state_ << 25, state_ ^= state_ >> 27;
    return state_ * 0x2545f4914f6cdd1du;
  }
  int64_t integer(int64_t low, int64_t high) {
    return low + static_cast<int64_t>((next() >> 11) % static_cast<std::uint64_t>(high - low + 1));
  }
  bool coin() { return integer(0, 1) == 1; }
  double uniform() { return static_cast<double>(next() >> 11) / 9007199254740992.0; }
  float real(float reach) { return static_cast<float>(2 * uniform() - 1) * reach; }

 private:
  std::uint64_t state_;
};

// Arrays of exactly the size that was asked for; they live as long as it.
class Heap {
 public:
  template <class T>
  T* take(int64_t count) {
    auto made = std::shared_ptr<T[]>(new T[static_cast<std::size_t>(count)]);
    T* first = made.get();
    kept_.push_back(std::move(made));
    std::memset(static_cast<void*>(first), 0x5a, static_cast<std::size_t>(count) * sizeof(T));
    return first;
  }
  template <class T>
  T* integers(Draw& draw, int64_t count, int64_t low, int64_t high) {
    T* made = take<T>(count);
    for (int64_t i = 0; i < count; ++i) made[i] = static_cast<T>(draw.integer(0, 7) == 0 ? high : draw.integer(low, high));
    return made;
  }
  float* reals(Draw& draw, int64_t count, float low, float high) {
    float* made = take<float>(count);
    for (int64_t i = 0; i < count; ++i) made[i] = low + (high - low) * static_cast<float>(draw.uniform());
    return made;
  }
  // As `take`, but up to a page that nobody may touch: no sanitizer looks at what gather instructions load.
  int16_t* guarded(int64_t count) {
    const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE)), bytes = static_cast<std::size_t>(count) * sizeof(int16_t);
    const std::size_t whole = (bytes + page - 1) / page * page;
    void* memory = mmap(nullptr, whole + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(static_cast<char*>(memory) + whole, page, PROT_NONE) != 0) std::abort();
    kept_.push_back(std::shared_ptr<void>(memory, [whole, page](void* at) { munmap(at, whole + page); }));
    return reinterpret_cast<int16_t*>(static_cast<char*>(memory) + whole - bytes);
  }

 private:
  std::vector<std::shared_ptr<void>> kept_;
};

// What a kernel works in: exactly as many bytes as it says, filled with what makes a read before a write show.
class Memory {
 public:
  Memory(int64_t bytes, int filling) : memory_(::operator new(static_cast<std::size_t>(bytes), std::align_val_t{64})) {
    std::memset(memory_, filling, static_cast<std::size_t>(bytes));
  }
  ~Memory() { ::operator delete(memory_, std::align_val_t{64}); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  void* get() const { return memory_; }

 private:
  void* memory_;
};

int64_t checks = 0;

template <class T>
void equal(const std::vector<T>& found, const std::vector<T>& wanted, const char* isa, const std::string& what) {
  ++checks;
  if (found.size() == wanted.size() && (found.empty() || std::memcmp(found.data(), wanted.data(), found.size() * sizeof(T)) == 0)) return;
  std::size_t at = 0;
  while (at < found.size() && std::memcmp(&found[at], &wanted[at], sizeof(T)) == 0) ++at;
  std::printf("%s, %s: element %zu of %zu is %.9g, not %.9g\n", what.c_str(), isa, at, wanted.size(), static_cast<double>(found[at]),
              static_cast<double>(wanted[at]));
  std::exit(1);
}

template <class... Numbers>
std::string text(const char* name, Numbers... numbers) {
  std::string made = name;
  ((made += " " + std::to_string(numbers)), ...);
  return made;
}

// Ratios 2^low ... 2^high of either sign as multipliers and shifts.
void ratios(Draw& draw, Heap& heap, int count, int low, int high, const int32_t** multiplier, const int32_t** shift) {
  auto *m = heap.take<int32_t>(count), *s = heap.take<int32_t>(count);
  for (int i = 0; i < count; ++i) {
    m[i] = static_cast<int32_t>(draw.integer(1 << 30, 0x7fffffff)) * (draw.coin() ? 1 : -1);
    s[i] = static_cast<int32_t>(30 - draw.integer(low, high));
  }
  *multiplier = m, *shift = s;
}

int bit_length(int64_t n) {
  int digits = 0;
  for (; n != 0; n >>= 1) ++digits;
  return digits;
}

int up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// Codes [outputs][inputs] in tiles of 16 by 4, zero where the matrix is not.
int8_t* tiled(Heap& heap, const int8_t* codes, int outputs, int inputs) {
  const int steps = up(inputs, 4) / 4;
  auto* tiles = heap.take<int8_t>(int64_t{up(outputs, 16)} * up(inputs, 4));
  for (int c = 0; c < up(outputs, 16); ++c) {
    for (int k = 0; k < up(inputs, 4); ++k) {
      const int64_t cell = ((int64_t{c / 16} * steps + k / 4) * 16 + c % 16) * 4 + k % 4;
      tiles[cell] = c < outputs && k < inputs ? codes[int64_t{c} * inputs + k] : int8_t{0};
    }
  }
  return tiles;
}

// The same of two codes a byte.
uint8_t* halved(Heap& heap, const int8_t* tiles, int64_t count) {
  auto* made = heap.take<uint8_t>(count / 2);
  for (int64_t i = 0; i < count / 2; ++i) made[i] = static_cast<uint8_t>((tiles[2 * i] & 15) | (tiles[2 * i + 1] & 15) << 4);
  return made;
}

// An integer layer; what differs by instruction set is its correction.
struct Linear {
  IntLinear common = {};
  std::vector<int32_t> sums;

  IntLinear of(const Isa& isa, Heap& heap) const {
    IntLinear made = common;
    const int factor = (common.is_unsigned ? 127 : 0) - isa.integer->code_offset;
    if (factor != 0) {
      auto* correction = heap.take<int32_t>(common.outputs);
      for (int c = 0; c < common.outputs; ++c) correction[c] = factor * sums[c];
      made.correction = correction;
    }
    return made;
  }
};

struct LinearShape {
  int inputs, outputs, in_bits, out_bits;
  bool dynamic, is_unsigned, rescales;
};

Linear linear_of(Draw& draw, Heap& heap, const LinearShape& shape) {
  const int8_t* codes = heap.integers<int8_t>(draw, int64_t{shape.outputs} * shape.inputs, -127, 127);
  Linear made;
  IntLinear& to = made.common;
  to.weight = tiled(heap, codes, shape.outputs, shape.inputs);
  for (int c = 0; c < shape.outputs; ++c) {
    int32_t sum = 0;
    for (int k = 0; k < shape.inputs; ++k) sum += codes[int64_t{c} * shape.inputs + k];
    made.sums.push_back(sum);
  }
  to.inputs = shape.inputs, to.outputs = shape.outputs, to.in_bits = shape.in_bits, to.out_bits = shape.out_bits;
  to.dynamic = shape.dynamic, to.is_unsigned = shape.is_unsigned;
  const int64_t widest = shape.dynamic ? (int64_t{1} << (shape.in_bits - 1)) - 1 : 1, reach = int64_t{shape.inputs} * 127 * 254 * widest;
  to.align = shape.dynamic ? std::max(0, bit_length(reach) - 30) : 0;
  const int most = bit_length(reach >> to.align);
  to.bias = heap.integers<int32_t>(draw, shape.outputs, -(int64_t{1} << (most - 2)), int64_t{1} << (most - 2));
  const int middle = shape.out_bits + 1 - most;
  ratios(draw, heap, shape.outputs, middle - 3, middle + 2, &to.multiplier, &to.shift);
  if (shape.rescales) {
    ratios(draw, heap, shape.inputs, shape.dynamic ? -2 : -15, shape.dynamic ? 1 : -8, &to.in_multiplier, &to.in_shift);
    to.in_offset = heap.integers<int32_t>(draw, shape.inputs, -60, 60);
  }
  return made;
}

IntNorm norm_of(Draw& draw, Heap& heap, int size, int out_bits, int low, int high) {
  IntNorm made = {};
  ratios(draw, heap, size, low, high, &made.weight, &made.shift);
  const int64_t most = int64_t{1} << (out_bits - 3);
  made.bias = heap.integers<int32_t>(draw, size, -most, most);
  made.eps = draw.coin() ? 0 : draw.integer(1, 1 << 20);
  made.size = size, made.out_bits = out_bits;
  return made;
}

// Edges from none of a row to all of it, levels of one digit and of two; without levels there is one edge.
WholeCodebook codebook_of(Draw& draw, Heap& heap, int heads) {
  constexpr int kCounts[] = {1, 3, 7, 255};
  WholeCodebook made = {};
  const bool pruning = draw.integer(0, 3) == 0;
  made.count = pruning ? 1 : kCounts[draw.integer(0, 3)];
  made.relative = draw.coin(), made.renormalize = draw.coin();
  auto* edges = heap.take<int32_t>(std::int64_t{heads} * made.count);
  for (int h = 0; h < heads; ++h) {
    for (int e = 0; e < made.count; ++e) edges[h * made.count + e] = static_cast<int32_t>(draw.integer(0, 1) << draw.integer(0, 24));
    std::sort(edges + h * made.count, edges + (h + 1) * made.count);
  }
  made.edges = edges;
  if (pruning) return made;
  auto* levels = heap.take<int32_t>(std::int64_t{heads} * (made.count + 1));
  for (int h = 0; h < heads; ++h) {
    const int64_t most = draw.coin() ? 127 : 16383;
    for (int c = 0; c <= made.count; ++c) levels[h * (made.count + 1) + c] = c == 0 ? 0 : static_cast<int32_t>(draw.integer(1, most));
  }
  made.levels = levels;
  return made;
}

IntAttention attention_of(Draw& draw, Heap& heap, int heads, int size) {
  constexpr int kGrids[] = {6, 8, 10, 12}, kBits[] = {8, 14, 15, 16};
  IntAttention made = {};
  ratios(draw, heap, heads, -22, -14, &made.score_multiplier, &made.score_shift);
  ratios(draw, heap, heads * size, -9, 0, &made.multiplier, &made.shift);
  made.heads = heads, made.size = size, made.grid = kGrids[draw.integer(0, 3)], made.bits = kBits[draw.integer(0, 3)];
  made.align = std::max(0, bit_length(int64_t{size} * 127 * 127 * 32767) - 30);
  made.out_bits = 16;
  const double unit = std::log(2.0) / (1 << made.grid);  // docs/math.md, 4
  made.exp_b = static_cast<int32_t>(1.3536624322664372 / unit + 0.5);
  made.exp_c = static_cast<int32_t>(0.3437225370424528 / (0.35815147 * unit * unit) + 0.5);
  if (draw.coin()) made.book = codebook_of(draw, heap, heads);
  return made;
}

IntActivation activation_of(Draw& draw, Heap& heap, int kind, int in_bits, bool positive) {
  IntActivation made = {};
  made.kind = kind, made.in_bits = in_bits, made.shifted = positive;
  if (kind == kTable) {
    const int64_t count = (int64_t{1} << in_bits) + 1;
    int16_t* table = heap.guarded(count);
    for (int64_t i = 0; i < count; ++i) table[i] = static_cast<int16_t>(draw.integer(positive ? 0 : -32767, 32767));
    made.table = table;
  } else if (kind == kPolynomial) {
    const double limit = (1 << (in_bits - 1)) - 1, unit = 8 / limit, root = unit / std::sqrt(2.0);
    const double low = positive ? -0.19 : 0, target = (8 - low) / 32767;
    const auto one = static_cast<int64_t>(1 / (0.2888 * root * root) + 0.5);
    const int places = std::max(0, bit_length(2 * one * static_cast<int64_t>(limit)) - 30);
    int exponent;
    const double fraction = std::frexp(unit * 0.2888 * root * root * std::ldexp(1.0, places) / 2 / target, &exponent);
    made.constants[0] = static_cast<int64_t>(1.769 / root), made.constants[1] = one, made.constants[2] = places;
    made.constants[3] = static_cast<int64_t>(-low / target);
    made.multiplier = static_cast<int32_t>(fraction * 2147483647.0), made.shift = 31 - exponent;
  }
  return made;
}

constexpr int kRowCounts[] = {0, 1, 7, 8, 9, 17};

// Calls `run` on every instruction set, first alone, then with `threads` threads; all must give the portable numbers.
template <class T>
void same_everywhere(const std::vector<Isa>& all, int threads, const std::string& what,
                     const std::function<std::vector<T>(const Isa&, int threads, int filling)>& run) {
  std::vector<T> wanted;
  for (const Isa& isa : all) {
    const std::vector<T> found = run(isa, 1, isa.integer == all[0].integer ? 0 : 0xa5);
    if (isa.integer == all[0].integer) wanted = found;
    equal(found, wanted, isa.name, what);
    if (threads > 1) equal(run(isa, threads, 0x7b), wanted, isa.name, what + text(", threads", threads));
  }
}

template <class T>
std::vector<T> taken(const T* first, int64_t count) {
  return std::vector<T>(first, first + count);
}

void rows(const std::vector<Isa>& all) {
  for (int width = 1; width <= 70; ++width) {
    for (int count : kRowCounts) {
      Draw draw(static_cast<std::uint64_t>(100 * width + count));
      Heap heap;
      for (int is_unsigned = 0; is_unsigned < 2; ++is_unsigned) {
        const int64_t cells = int64_t{count} * width, limit = (int64_t{1} << draw.integer(1, 30)) - 1;
        const int32_t* x = heap.integers<int32_t>(draw, cells, is_unsigned ? 0 : -limit, limit);
        same_everywhere<int64_t>(all, 1 + count % 4, text("quantize_rows", width, count, is_unsigned), [&](const Isa& isa, int threads, int) {
          Heap own;
          auto* codes = own.take<int8_t>(cells);
          auto* amax = own.take<int64_t>(count);
          isa.integer->quantize_rows(x, count, width, is_unsigned != 0, codes, amax, threads);
          std::vector<int64_t> found(codes, codes + cells);
          found.insert(found.end(), amax, amax + count);
          return found;
        });
      }
      const int64_t cells = int64_t{count} * width, limit = (int64_t{1} << draw.integer(0, 23)) - 1;
      const int32_t* x = heap.integers<int32_t>(draw, cells, -limit, limit);
      const IntNorm norm = norm_of(draw, heap, width, static_cast<int>(draw.integer(8, 30)), -25, 2);
      same_everywhere<int32_t>(all, 1 + (count + width) % 4, text("norm", width, count), [&](const Isa& isa, int threads, int) {
        Heap own;
        auto* out = own.take<int32_t>(cells);
        isa.integer->norm(norm, x, count, out, threads);
        return taken(out, cells);
      });
    }
  }
}

void integer_linears(const std::vector<Isa>& all) {
  const auto check = [&](int inputs, int outputs, int count) {
    Draw draw(static_cast<std::uint64_t>(1000 * inputs + outputs));
    Heap heap;
    const int in_bits = static_cast<int>(draw.integer(2, 22));
    const LinearShape shape = {inputs, outputs, in_bits, static_cast<int>(draw.integer(2, 31)), draw.coin(), draw.coin(), false};
    const Linear linear = linear_of(draw, heap, shape);
    const int8_t* codes = heap.integers<int8_t>(draw, int64_t{count} * inputs, -127, 127);
    const int64_t* amax = shape.dynamic ? heap.integers<int64_t>(draw, count, 1, (1 << (in_bits - 1)) - 1) : nullptr;
    same_everywhere<int32_t>(all, 1 + (inputs + outputs) % 4, text("integer linear", inputs, outputs, count),
                             [&](const Isa& isa, int threads, int filling) {
                               Heap own;
                               const IntLinear given = linear.of(isa, own);
                               auto* out = own.take<int32_t>(int64_t{count} * outputs);
                               const Memory memory(isa.integer->linear_bytes(given, count), filling);
                               isa.integer->linear(given, codes, amax, count, out, threads, memory.get());
                               return taken(out, int64_t{count} * outputs);
                             });
  };
  for (int inputs = 1; inputs <= 70; ++inputs) {
    for (int outputs = 1; outputs <= 70; ++outputs) check(inputs, outputs, kRowCounts[(inputs + 5 * outputs) % 6]);
  }
  for (int inputs : {1, 255, 256, 257, 1030}) {  // panels whose successors are asked for early, or are too long for it
    for (int outputs : {95, 96, 97, 145, 200}) {
      for (int count : kRowCounts) check(inputs, outputs, count);
    }
  }
}

void products(const std::vector<Isa>& all) {
  for (int inputs = 4; inputs <= 72; inputs += 4) {
    for (int outputs = 16; outputs <= 160; outputs += 16) {
      const int count = 1 + (inputs / 4 + outputs / 16) % 19;
      Draw draw(static_cast<std::uint64_t>(inputs + outputs));
      Heap heap;
      const int8_t* codes = heap.integers<int8_t>(draw, int64_t{count} * inputs, -127, 127);
      const int8_t* weight = heap.integers<int8_t>(draw, int64_t{outputs} * inputs, -127, 127);
      const int8_t* tiles = tiled(heap, weight, outputs, inputs);
      std::vector<int32_t> wanted;
      for (int r = 0; r < count; ++r) {
        for (int c = 0; c < outputs; ++c) {
          int32_t sum = 0;
          for (int k = 0; k < inputs; ++k) sum += codes[r * inputs + k] * weight[c * inputs + k];
          wanted.push_back(sum);
        }
      }
      for (const Isa& isa : all) {
        Heap own;
        auto* a = own.take<uint8_t>(int64_t{count} * inputs);
        for (int i = 0; i < count * inputs; ++i) a[i] = static_cast<uint8_t>(codes[i] + isa.integer->code_offset);
        auto* out = own.take<int32_t>(int64_t{count} * outputs);
        isa.integer->product(a, tiles, count, inputs, outputs, out);
        for (int i = 0; i < count * outputs; ++i) {
          const int c = i % outputs;
          for (int k = 0; k < inputs; ++k) out[i] -= isa.integer->code_offset * weight[c * inputs + k];
        }
        equal(taken(out, int64_t{count} * outputs), wanted, isa.name, text("product", inputs, outputs, count));
        isa.integer->spin(3);
      }
    }
  }
}

void attentions(const std::vector<Isa>& all) {
  for (int size = 1; size <= 70; ++size) {
    for (int tokens = 1; tokens <= 33; tokens += size % 8 == 1 ? 1 : 4) {
      Draw draw(static_cast<std::uint64_t>(100 * size + tokens));
      Heap heap;
      const int heads = 1 + (size + tokens) % 3, batch = 1 + tokens % 3;
      const IntAttention attention = attention_of(draw, heap, heads, size);
      const int64_t cells = int64_t{batch} * tokens * heads * size;
      const int32_t* query = heap.integers<int32_t>(draw, cells, -32767, 32767);
      const int8_t *key = heap.integers<int8_t>(draw, cells, -127, 127), *value = heap.integers<int8_t>(draw, cells, -127, 127);
      std::vector<int32_t> kept, from = {0};
      for (int i = 0; i < batch; ++i) {  // all keys, some or none
        for (int k = 0; k < tokens; ++k) {
          if (i == 0 || (i == 1 && draw.integer(0, 3) > 0)) kept.push_back(k);
        }
        from.push_back(static_cast<int32_t>(kept.size()));
      }
      auto *keys = heap.take<int32_t>(static_cast<int64_t>(kept.size())), *starts = heap.take<int32_t>(batch + 1);
      std::copy(kept.begin(), kept.end(), keys);
      std::copy(from.begin(), from.end(), starts);
      same_everywhere<int32_t>(all, 1 + tokens % 4, text("attention", size, tokens, heads, batch), [&](const Isa& isa, int threads, int filling) {
        Heap own;
        auto* out = own.take<int32_t>(cells);
        const Memory memory(isa.integer->attention_bytes(attention, tokens) * threads, filling);
        isa.integer->attention(attention, query, key, value, keys, starts, batch, tokens, out, threads, memory.get());
        return taken(out, cells);
      });
    }
  }
}

// Attention on int8 products: without a codebook, pruned, and in codes of 1 to 8 bits with levels of one digit or two.
void code_attentions(const std::vector<Isa>& all) {
  for (int size = 1; size <= 70; size += 3) {
    for (int keys = 1; keys <= 37; keys += size % 4 == 1 ? 1 : 5) {
      Draw draw(static_cast<std::uint64_t>(100 * size + keys));
      Heap heap;
      Int8Attention at = {};
      at.groups = 1 + keys % 2, at.heads = at.groups * (1 + size % 3), at.batch = 1 + size % 2;
      at.queries = static_cast<int32_t>(draw.integer(1, 11)), at.keys = keys, at.size = size;
      const int64_t rows = int64_t{at.batch} * at.heads * at.queries, held = int64_t{at.batch} * at.groups * keys;
      at.query = heap.integers<int8_t>(draw, rows * size, -127, 127);
      at.key = heap.integers<int8_t>(draw, held * size, -127, 127);
      at.value = heap.integers<int8_t>(draw, held * size, -127, 127);
      at.unit = heap.reals(draw, rows, 0, 0.01f), at.key_unit = heap.reals(draw, held, 0, 0.1f);
      at.value_scale = heap.reals(draw, at.groups, 0.01f, 1);
      if (draw.coin()) {
        at.mask = heap.integers<uint8_t>(draw, rows * keys, 0, 1);
        at.mask_query = keys, at.mask_head = int64_t{at.queries} * keys, at.mask_batch = at.heads * at.mask_head;
      }
      const int bits = static_cast<int>(draw.integer(-1, 8));
      if (bits >= 0) {
        const int edges = std::max(1, (1 << bits) - 1);
        auto* shares = heap.integers<int32_t>(draw, int64_t{at.heads} * edges, 0, 1 << draw.integer(0, 24));
        for (int h = 0; h < at.heads; ++h) std::sort(shares + h * edges, shares + (h + 1) * edges);
        int32_t* levels = bits == 0 ? nullptr : heap.take<int32_t>(int64_t{at.heads} * (edges + 1));
        for (int i = 0; levels != nullptr && i < at.heads * (edges + 1); ++i) {
          const bool wide = i / (edges + 1) % 2 == 1;
          levels[i] = i % (edges + 1) == 0 ? 0 : static_cast<int32_t>(draw.integer(1, wide ? 16383 : 127));
        }
        at.book = {shares, levels, edges, draw.coin(), draw.coin()};
        at.level_unit = heap.reals(draw, at.heads, 0, 0.01f);
      }
      same_everywhere<float>(all, 1 + keys % 4, text("attention on codes", size, keys, bits), [&](const Isa& isa, int threads, int filling) {
        Heap own;
        auto* out = own.take<float>(rows * size);
        auto* codes = own.take<uint8_t>(rows * keys);
        const Memory memory(isa.floating->attention_bytes(at) * threads, filling);
        isa.floating->attention(at, out, codes, threads, memory.get());
        std::vector<float> found = taken(out, rows * size);
        found.insert(found.end(), codes, codes + rows * keys);
        return found;
      });
    }
  }
}

// Where sequences of up to `longest` rows start; some have none.
std::vector<int32_t> ragged(Draw& draw, int sequences, int longest) {
  std::vector<int32_t> starts = {0};
  for (int i = 0; i < sequences; ++i) {
    const int64_t some = draw.integer(0, 4) == 0 ? 0 : draw.integer(1, longest);
    starts.push_back(starts.back() + static_cast<int32_t>(i == 0 ? longest : some));
  }
  return starts;
}

struct Shape {
  int heads, size, inner, layers, sequences, longest;
};

// Few rows for threads that share matrices; many for threads with blocks of their own; long texts for shared heads.
Shape shape_of(Draw& draw, int number) {
  Shape made;
  made.heads = static_cast<int>(draw.integer(1, 4));
  made.size = static_cast<int>(draw.integer(1, number % 3 == 0 ? 35 : 9));
  made.inner = static_cast<int>(draw.integer(1, number % 5 == 0 ? 150 : 70));
  made.layers = static_cast<int>(draw.integer(1, 3));
  switch (number % 4) {
    case 0:
      made.sequences = static_cast<int>(draw.integer(1, 3)), made.longest = static_cast<int>(draw.integer(1, 9));
      break;
    case 1:
      made.sequences = static_cast<int>(draw.integer(2, 6)), made.longest = static_cast<int>(draw.integer(1, 33));
      break;
    case 2:
      made.sequences = static_cast<int>(draw.integer(20, 60)), made.longest = static_cast<int>(draw.integer(10, 33));
      break;
    default:
      made.sequences = 1, made.longest = static_cast<int>(draw.integer(60, 300)), made.heads = 1;
  }
  return made;
}

void integer_encoders(const std::vector<Isa>& all, int count) {
  for (int number = 0; number < count; ++number) {
    Draw draw(static_cast<std::uint64_t>(7000 + number));
    Heap heap;
    const Shape shape = shape_of(draw, number);
    const int hidden = shape.heads * shape.size;
    const bool projects = number % 3 == 1, is_static = number % 5 == 4;
    const int embedding = projects ? static_cast<int>(draw.integer(1, 70)) : hidden;
    const int kind = number / 2 % 3, in_bits = kind == kRelu ? 16 : static_cast<int>(draw.integer(6, 14));
    const bool positive = kind == kRelu || draw.coin();

    IntEncoder encoder = {};
    for (int t = 0; t < kTables; ++t) {
      if (t > 0 && draw.coin()) continue;
      IntRows& table = encoder.tables[t];
      table.rows = static_cast<int32_t>(draw.integer(1, 20)), table.bits = draw.coin() ? 8 : 16;
      const int64_t cells = int64_t{table.rows} * embedding;
      if (table.bits == 8) {
        table.weight = heap.integers<int8_t>(draw, cells, -127, 127);
      } else {
        table.weight = heap.integers<int16_t>(draw, cells, -32767, 32767);
      }
      ratios(draw, heap, table.rows, table.bits == 8 ? 6 : -2, table.bits == 8 ? 12 : 4, &table.multiplier, &table.shift);
    }
    encoder.norm = norm_of(draw, heap, embedding, 22, -12, -9);
    const auto linear = [&](int inputs, int outputs, int in, int out, bool is_unsigned) {
      const LinearShape given = {inputs, outputs, in, out, !is_static, is_unsigned, is_static || draw.coin()};
      return linear_of(draw, heap, given);
    };
    Linear projection;
    if (projects) projection = linear(embedding, hidden, 22, 22, false);
    std::vector<std::vector<Linear>> linears;
    std::vector<IntBlock> blocks(static_cast<std::size_t>(shape.layers));
    for (IntBlock& block : blocks) {
      linears.push_back({linear(hidden, hidden, 22, 16, false), linear(hidden, hidden, 22, 8, false), linear(hidden, hidden, 22, 8, false),
                         linear(hidden, hidden, 16, 22, false), linear(hidden, shape.inner, 22, in_bits, false),
                         linear(shape.inner, hidden, 16, 22, positive && !is_static)});
      IntLinear& down = linears.back()[5].common;
      if (down.is_unsigned) down.in_multiplier = down.in_shift = down.in_offset = nullptr;  // what is unsigned stays so
      block.attention = attention_of(draw, heap, shape.heads, shape.size);
      block.attention_norm = norm_of(draw, heap, hidden, 22, -12, -9), block.ffn_norm = norm_of(draw, heap, hidden, 22, -12, -9);
      block.act = activation_of(draw, heap, kind, in_bits, positive);
    }
    encoder.count = shape.layers, encoder.hidden = hidden;

    const std::vector<int32_t> from = ragged(draw, shape.sequences, shape.longest);
    IntBatch batch = {};
    batch.sequences = shape.sequences, batch.tokens = from.back();
    auto* starts = heap.take<int32_t>(static_cast<int64_t>(from.size()));
    std::copy(from.begin(), from.end(), starts);
    batch.starts = starts;
    for (int t = 0; t < kTables; ++t) {
      if (encoder.tables[t].weight != nullptr) batch.ids[t] = heap.integers<int64_t>(draw, batch.tokens, 0, encoder.tables[t].rows - 1);
    }
    const auto what = text("integer encoder", number, shape.heads, shape.size, shape.inner, shape.layers, shape.sequences, batch.tokens);
    const auto run = [&](const Isa& isa, int threads, int filling) {
      Heap own;
      auto* mine = own.take<IntBlock>(shape.layers);
      for (int i = 0; i < shape.layers; ++i) {
        mine[i] = blocks[static_cast<std::size_t>(i)];
        IntLinear* roles[] = {&mine[i].query, &mine[i].key, &mine[i].value, &mine[i].output, &mine[i].up, &mine[i].down};
        for (int k = 0; k < 6; ++k) *roles[k] = linears[static_cast<std::size_t>(i)][static_cast<std::size_t>(k)].of(isa, own);
      }
      IntEncoder given = encoder;
      given.blocks = mine;
      if (projects) given.projection = projection.of(isa, own);
      auto* out = own.take<int32_t>(int64_t{batch.tokens} * hidden);
      const Memory memory(isa.integer->encoder_bytes(given, batch, threads), filling);
      isa.integer->encoder(given, batch, out, threads, memory.get());
      return taken(out, int64_t{batch.tokens} * hidden);
    };
    for (int threads = 2; threads <= 4; threads += number % 2 + 1) same_everywhere<int32_t>(all, threads, what, run);
  }
}

QLinear q_linear_of(Draw& draw, Heap& heap, int inputs, int outputs, int width, bool nibbles, bool biased, bool is_static,
                    bool has_offset = false) {
  const int most = nibbles ? 7 : 127, blocks = (inputs + width - 1) / width;
  const int8_t* codes = heap.integers<int8_t>(draw, int64_t{outputs} * inputs, has_offset ? -most - 1 : -most, most);
  const int8_t* tiles = tiled(heap, codes, outputs, inputs);
  QLinear made = {};
  made.weight = tiles;
  if (nibbles) made.weight = halved(heap, tiles, int64_t{up(outputs, 16)} * up(inputs, 4));
  auto* sums = heap.take<int32_t>(int64_t{blocks} * outputs);
  for (int b = 0; b < blocks; ++b) {
    for (int c = 0; c < outputs; ++c) {
      int32_t sum = 0;
      for (int k = b * width; k < std::min((b + 1) * width, inputs); ++k) sum += codes[int64_t{c} * inputs + k];
      sums[b * outputs + c] = sum;
    }
  }
  const float unit = 1.7f / static_cast<float>(most) / std::sqrt(static_cast<float>(inputs));
  made.row_sums = sums, made.scale = heap.reals(draw, int64_t{blocks} * outputs, 0.5f * unit, unit);
  if (biased) made.bias = heap.reals(draw, outputs, -0.5f, 0.5f);
  if (is_static) made.act_scale = heap.reals(draw, 1, 0.01f, 0.03f);
  if (has_offset) made.offset = heap.reals(draw, int64_t{blocks} * outputs, -unit, unit);
  made.inputs = inputs, made.outputs = outputs, made.column_blocks = blocks, made.width = width, made.nibbles = nibbles;
  return made;
}

void float_linears(const std::vector<Isa>& all) {
  const auto check = [&](int inputs, int outputs, int count) {
    Draw draw(static_cast<std::uint64_t>(1000 * inputs + outputs));
    Heap heap;
    int width = inputs;
    for (int wanted : {8, 20, 32, 264}) {
      if (inputs > wanted && draw.coin()) width = wanted;
    }
    const QLinear linear = q_linear_of(draw, heap, inputs, outputs, width, draw.coin(), draw.coin(), draw.coin(), draw.coin());
    float* x = heap.take<float>(int64_t{count} * inputs);
    for (int64_t i = 0; i < int64_t{count} * inputs; ++i) x[i] = draw.real(3);
    if (count > 2) std::fill(x + inputs, x + 2 * inputs, 0.0f);
    const auto what = text("float linear", inputs, outputs, count, width, linear.nibbles);
    same_everywhere<float>(all, 1 + (inputs + outputs) % 4, what, [&](const Isa& isa, int threads, int filling) {
      Heap own;
      auto* out = own.take<float>(int64_t{count} * outputs);
      const Memory memory(isa.floating->linear_bytes(linear, count, threads), filling);
      isa.floating->linear(linear, x, count, out, threads, memory.get());
      return taken(out, int64_t{count} * outputs);
    });
  };
  for (int inputs = 1; inputs <= 70; ++inputs) {
    for (int outputs = 1; outputs <= 70; ++outputs) check(inputs, outputs, kRowCounts[(inputs + 5 * outputs) % 6]);
  }
  for (int inputs : {252, 256, 260, 512, 516, 520, 780, 1028}) {  // around kMostSteps steps of nibbles, and twice that
    for (int outputs : {1, 16, 33, 49, 100}) {
      for (int count : kRowCounts) check(inputs, outputs, count);
    }
  }
}

// How far rows of one instruction set are from those of another.
class Off {
 public:
  void add(const std::vector<float>& found, const std::vector<float>& wanted, int width) {
    for (std::size_t begin = 0; begin < wanted.size(); begin += static_cast<std::size_t>(width)) {
      double off = 0, norm = 0;
      for (std::size_t i = begin; i < begin + static_cast<std::size_t>(width); ++i) {
        const double is = wanted[i], error = found[i] - is;
        off += error * error, norm += is * is;
      }
      const double error = std::sqrt(off / (norm + 1e-6));
      worst_ = error > worst_ || std::isnan(error) ? error : worst_;
      ++total_, moved_ += error > 1e-4;
    }
    ++checks;
  }
  void report(const char* what) const {
    std::printf("%s: %lld of %lld rows moved by a code, at most %.3g\n", what, static_cast<long long>(moved_),
                static_cast<long long>(total_), worst_);
    if (!(worst_ < 0.1) || moved_ * 50 > total_) std::exit(1);
  }

 private:
  double worst_ = 0;
  int64_t total_ = 0, moved_ = 0;
};

void float_encoders(const std::vector<Isa>& all, int count) {
  Off off;
  for (int number = 0; number < count; ++number) {
    Draw draw(static_cast<std::uint64_t>(9000 + number));
    Heap heap;
    Shape shape = shape_of(draw, number);
    const int hidden = shape.heads * shape.size;
    const bool is_static = number % 5 == 4;
    const auto linear = [&](int inputs, int outputs) {
      int width = inputs;  // half of the linears hold nibbles, and many of those that can have blocks of columns
      for (int wanted : {8, 12, 20}) {
        if (wanted < inputs && draw.coin()) width = wanted;
      }
      const bool nibbles = draw.coin(), biased = draw.coin();
      return q_linear_of(draw, heap, inputs, outputs, width, nibbles, biased, is_static);
    };
    const auto norm = [&]() {
      Norm made = {};
      made.weight = heap.reals(draw, hidden, 0.5f, 1.5f), made.bias = heap.reals(draw, hidden, -0.5f, 0.5f);
      made.eps = 1e-5f, made.size = hidden;
      return made;
    };
    auto* blocks = heap.take<QBlock>(shape.layers);
    for (int i = 0; i < shape.layers; ++i) {
      QBlock& block = blocks[i];
      block.query = linear(hidden, hidden), block.key = linear(hidden, hidden), block.value = linear(hidden, hidden);
      block.output = linear(hidden, hidden), block.attention_norm = norm();
      block.up = linear(hidden, shape.inner), block.down = linear(shape.inner, hidden), block.ffn_norm = norm();
    }
    const QEncoder encoder = {blocks, shape.layers, hidden, shape.size, number % 2 == 0 ? kGelu : kFloatRelu};
    const std::vector<int32_t> from = ragged(draw, shape.sequences, shape.longest);
    auto* starts = heap.take<int32_t>(static_cast<int64_t>(from.size()));
    std::copy(from.begin(), from.end(), starts);
    const int64_t cells = int64_t{from.back()} * hidden;
    const float* x = heap.reals(draw, cells, -2, 2);
    const auto run = [&](const Isa& isa, int threads, int filling) {
      Heap own;
      auto* out = own.take<float>(cells);
      std::copy(x, x + cells, out);
      const Memory memory(isa.floating->encoder_bytes(encoder, starts, shape.sequences, threads), filling);
      isa.floating->encoder(encoder, out, starts, shape.sequences, threads, memory.get());
      return taken(out, cells);
    };
    const auto what = text("float encoder", number, shape.heads, shape.size, shape.inner, shape.layers, shape.sequences, from.back());
    const std::vector<float> wanted = run(all[0], 1, 0);
    for (const Isa& isa : all) {
      const std::vector<float> alone = run(isa, 1, 0xa5);
      for (int threads = 2; threads <= 4; ++threads) equal(run(isa, threads, 0x7b), alone, isa.name, what + text(", threads", threads));
      off.add(alone, wanted, hidden);
    }
  }
  off.report("float encoders");
}

// A linear of a decoder of either kind.
DecoderLinear decoder_linear(Draw& draw, Heap& heap, int inputs, int outputs, bool is_float, bool is_static) {
  int width = inputs;
  for (int wanted : {8, 12, 20}) {
    if (wanted < inputs && draw.coin()) width = wanted;
  }
  const bool nibbles = draw.coin(), biased = draw.coin(), shifted = draw.coin();
  DecoderLinear made = {};
  made.is_float = is_float;
  if (!is_float) {
    made.quantized = q_linear_of(draw, heap, inputs, outputs, width, nibbles, biased, is_static, shifted);
    return made;
  }
  const int blocks = up(inputs, width) / width, block_rows = outputs % 2 == 0 && draw.coin() ? 2 : 1;
  const int8_t* tiles = tiled(heap, heap.integers<int8_t>(draw, int64_t{outputs} * inputs, nibbles ? -8 : -128, nibbles ? 7 : 127), outputs, inputs);
  CodeLinear& codes = made.codes;
  codes.weight = nibbles ? static_cast<const void*>(halved(heap, tiles, int64_t{up(outputs, 16)} * up(inputs, 4))) : tiles;
  codes.scale = heap.reals(draw, int64_t{outputs} / block_rows * blocks, 0.001f, 0.01f);
  codes.offset = shifted ? heap.reals(draw, int64_t{outputs} / block_rows * blocks, -0.1f, 0.1f) : nullptr;
  codes.bias = biased ? heap.reals(draw, outputs, -1, 1) : nullptr;
  codes.inputs = inputs, codes.outputs = outputs, codes.block_rows = block_rows, codes.column_blocks = blocks, codes.width = width;
  codes.layout = nibbles ? kCodeNibbles : kCodeTiles;
  return made;
}

void decoders(const std::vector<Isa>& all, int count) {
  Off off_front, off_back;
  for (int number = 0; number < count; ++number) {
    Draw draw(static_cast<std::uint64_t>(7000 + number));
    Heap heap;
    const int groups = static_cast<int>(draw.integer(1, 3)), heads = groups * static_cast<int>(draw.integer(1, 3));
    const int size = 2 * static_cast<int>(draw.integer(1, 17)), hidden = static_cast<int>(draw.integer(3, 70));
    const int inner = static_cast<int>(draw.integer(1, 90)), counts[] = {1, 2, 3, 4, 5, 40, 131, 700};
    const int rows = counts[number % 8], angles = number % 3 == 0 ? rows : static_cast<int>(draw.integer(1, rows));
    const auto linear = [&](int inputs, int outputs) {
      const bool is_float = number % 4 == 1 || (number % 4 == 2 && draw.coin());
      return decoder_linear(draw, heap, inputs, outputs, is_float, number % 5 == 4);
    };
    const auto norm = [&]() { return RmsNorm{heap.reals(draw, hidden, 0.5f, 1.5f), 1e-5f, hidden}; };
    const DecoderFront front = {linear(hidden, heads * size), linear(hidden, groups * size), linear(hidden, groups * size), norm(),
                                heads, groups, size};
    const DecoderBack back = {linear(heads * size, hidden), linear(hidden, inner), linear(hidden, inner), linear(inner, hidden), norm(),
                              number % 2 == 0 ? kSilu : kGeluGate};
    const Rotation rotation = {heap.reals(draw, int64_t{angles} * size, -1, 1), heap.reals(draw, int64_t{angles} * size, -1, 1), angles};
    const float *x = heap.reals(draw, int64_t{rows} * hidden, -2, 2), *context = heap.reals(draw, int64_t{rows} * heads * size, -2, 2);
    const int width = (heads + 2 * groups) * size;
    const auto first = [&](const Isa& isa, int threads, int filling) {
      Heap own;
      auto* out = own.take<float>(int64_t{rows} * width);
      const Memory memory(isa.floating->decoder_front_bytes(front, rows, threads), filling);
      isa.floating->decoder_front(front, rotation, x, rows, out, threads, memory.get());
      return taken(out, int64_t{rows} * width);
    };
    const auto second = [&](const Isa& isa, int threads, int filling) {
      Heap own;
      auto* out = own.take<float>(int64_t{rows} * hidden);
      const Memory memory(isa.floating->decoder_back_bytes(back, rows, threads), filling);
      isa.floating->decoder_back(back, context, x, rows, out, threads, memory.get());
      return taken(out, int64_t{rows} * hidden);
    };
    const auto what = text("decoder", number, heads, groups, size, hidden, inner, rows);
    const std::vector<float> wanted_first = first(all[0], 1, 0), wanted_second = second(all[0], 1, 0);
    for (const Isa& isa : all) {
      const std::vector<float> alone_first = first(isa, 1, 0xa5), alone_second = second(isa, 1, 0xa5);
      for (int threads = 2; threads <= 4; ++threads) {
        equal(first(isa, threads, 0x7b), alone_first, isa.name, what + text(", threads", threads));
        equal(second(isa, threads, 0x7b), alone_second, isa.name, what + text(", threads", threads));
      }
      off_front.add(alone_first, wanted_first, width), off_back.add(alone_second, wanted_second, hidden);
    }
  }
  off_front.report("decoders before attention"), off_back.report("decoders behind attention");
}

void wide_attentions(const std::vector<Isa>& all, int count) {
  for (int number = 0; number < count; ++number) {
    Draw draw(static_cast<std::uint64_t>(5000 + number));
    Heap heap;
    const auto some = [&](int most) { return static_cast<int32_t>(draw.integer(1, most)); };
    WideAttention attention = {};
    attention.batch = some(3), attention.groups = some(3), attention.heads = attention.groups * some(10);
    attention.keys = some(70), attention.size = some(70), attention.scaling = 0.3;
    const int64_t row = attention.size + some(3), keys = attention.keys, heads = attention.heads;
    const auto states = [&](int64_t rows) { return heap.reals(draw, (rows - 1) * row + attention.size, -2, 2); };
    attention.query = states(attention.batch * heads), attention.query_head = row, attention.query_batch = heads * row;
    attention.key = states(attention.batch * attention.groups * keys), attention.value = states(attention.batch * attention.groups * keys);
    attention.key_token = attention.value_token = row, attention.key_head = attention.value_head = keys * row;
    attention.key_batch = attention.value_batch = attention.groups * keys * row;
    if (draw.coin()) {
      const bool by_head = draw.coin();
      attention.mask = heap.integers<uint8_t>(draw, attention.batch * (by_head ? heads : 1) * keys, 0, 1);
      attention.mask_head = by_head ? keys : 0, attention.mask_batch = by_head ? heads * keys : keys;
    }
    const int64_t cells = attention.batch * heads * attention.size;
    same_everywhere<float>(all, 1 + number % 4, text("wide attention", number), [&](const Isa& isa, int threads, int filling) {
      Heap own;
      auto* out = own.take<float>(cells);
      const Memory memory(isa.floating->wide_attention_bytes(attention) * threads, filling);
      isa.floating->wide_attention(attention, out, threads, memory.get());
      return taken(out, cells);
    });
  }
}

// What a sanitizer has to see.
void blunder(const std::string& mistake, const Isa& isa) {
  Draw draw(1);
  Heap heap;
  if (mistake == "short-input") {
    const int32_t* x = heap.integers<int32_t>(draw, 63, -9, 9);
    isa.integer->quantize_rows(x, 1, 64, false, heap.take<int8_t>(64), heap.take<int64_t>(1), 1);
  } else if (mistake == "short-output") {
    const int32_t* x = heap.integers<int32_t>(draw, 64, -9, 9);
    isa.integer->norm(norm_of(draw, heap, 64, 22, -12, -9), x, 1, heap.take<int32_t>(63), 1);
  } else if (mistake == "short-weight") {
    QLinear linear = q_linear_of(draw, heap, 32, 32, 32, false, true, false);
    linear.weight = heap.take<int8_t>(32 * 32 - 1);
    const Memory memory(isa.floating->linear_bytes(linear, 1, 1), 0);
    isa.floating->linear(linear, heap.reals(draw, 32, -1, 1), 1, heap.take<float>(32), 1, memory.get());
  } else if (mistake == "short-table") {
    const volatile int16_t read = activation_of(draw, heap, kTable, 8, false).table[(1 << 8) + 1];
    (void)read;
  } else if (mistake == "race") {
    // All threads are there before the first adds, by relaxed steps, which order nothing: the race is there on any machine,
    // even where one thread would be done, and its mutex taken by the next, before that one starts.
    int sum = 0;
    std::atomic<int> arrived{0};
    auto job = [&sum, &arrived](const Crew& crew) {
      arrived.fetch_add(1, std::memory_order_relaxed);
      while (arrived.load(std::memory_order_relaxed) < crew.size) std::this_thread::yield();
      sum = sum + 1;
    };
    together(4, job);
  } else if (mistake == "neighbour") {
    const Memory memory(1024, 0);
    Cutter cutter(memory.get());
    auto* first = cutter.take<int32_t>(3);
    auto* second = cutter.take<int32_t>(3);
    second[2] = first[static_cast<std::size_t>(draw.integer(3, 3))];
  } else if (mistake == "overflow") {
    volatile int32_t large = 0x7fffffff;
    large = large + 1;
  }
}

}  // namespace

int main(int count, char** arguments) {
  const std::vector<Isa> all = isas();
  if (count == 2) {
    for (const Isa& isa : all) std::printf("%s\n", isa.name);
    return 0;
  }
  if (count == 3) {
    for (const Isa& isa : all) {
      if (isa.name == std::string(arguments[2])) blunder(arguments[1], isa);
    }
    return 0;
  }
  rows(all);
  products(all);
  integer_linears(all);
  attentions(all);
  code_attentions(all);
  integer_encoders(all, 60);
  float_linears(all);
  float_encoders(all, 60);
  decoders(all, 80);
  wide_attentions(all, 60);
  std::printf("%lld checks of %zu instruction sets\n", static_cast<long long>(checks), all.size());
  return 0;
}
