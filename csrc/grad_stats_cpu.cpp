// Gradient statistics and clipping on the CPU: torch's threads take chunks one by one, whatever their sizes.

#include "grad_stats.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ava {

struct Float16 { uint16_t bits; };
struct Bfloat16 { uint16_t bits; };

typedef float f32x4 __attribute__((vector_size(16)));
typedef int32_t i32x4 __attribute__((vector_size(16)));
typedef uint16_t u16x4 __attribute__((vector_size(8), aligned(2), may_alias));  // read where it lies
typedef double f64x4 __attribute__((vector_size(32)));
typedef int64_t i64x4 __attribute__((vector_size(32)));

}  // namespace ava

#if defined(__x86_64__)
#define LANES avx2
#define TARGET __attribute__((target("avx2")))
#define HALVES(from) ((i32x4)_mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))))
#define WIDEN(floats) ((f64x4)_mm256_cvtps_pd((__m128)(floats)))
#define LARGER(a, b) ((i32x4)_mm_max_epi32((__m128i)(a), (__m128i)(b)))
#include "grad_stats_lanes.h"
#endif
#define LANES baseline
#define TARGET
#define HALVES(from) __builtin_convertvector(*reinterpret_cast<const u16x4*>(from), i32x4)
#define WIDEN(floats) __builtin_convertvector(floats, f64x4)
#define LARGER(a, b) choose((a) > (b), a, b)
#include "grad_stats_lanes.h"

namespace ava {
namespace {

bool has_avx2() {
#if defined(__x86_64__)
  static const bool found = __builtin_cpu_supports("avx2");
  return found;
#else
  return false;
#endif
}

#if defined(__x86_64__)
#define ON_THIS_CPU(call) (has_avx2() ? avx2::call : baseline::call)
#else
#define ON_THIS_CPU(call) (baseline::call)
#endif

struct Chunk {
  int64_t span, begin, size;
};

std::vector<Chunk> cut(const Span* spans, int64_t count) {
  std::vector<Chunk> chunks;
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t begin = 0; begin < spans[i].size; begin += CHUNK) {
      chunks.push_back({i, begin, std::min(CHUNK, spans[i].size - begin)});
    }
  }
  return chunks;
}

// Calls work(c) once for every chunk c. A thread takes the next chunks when it is done with its last ones, as chunks
// differ in size and cores in speed; a few at a time where they are small.
template <typename Work>
void for_each_chunk(const std::vector<Chunk>& chunks, const Work& work) {
  const int64_t count = static_cast<int64_t>(chunks.size());
  int64_t elements = 0;
  for (const Chunk& chunk : chunks) elements += chunk.size;
  const int64_t workers = elements < CHUNK ? 1 : torch::stable::get_num_threads();
  const int64_t step = std::max<int64_t>(1, std::min<int64_t>(64, count / (32 * workers)));
  std::atomic<int64_t> next{0};
  const auto run = [&](int64_t, int64_t) {
    for (int64_t begin; (begin = next.fetch_add(step)) < count;) {
      for (int64_t c = begin; c < std::min(begin + step, count); ++c) work(c);
    }
  };
  if (workers == 1) {
    run(0, 1);
  } else {
    torch::stable::parallel_for(0, workers, 1, run);
  }
}

void add(Partial& total, const Partial& partial) {
  total.squares += partial.squares;
  total.largest = std::max(total.largest, partial.largest);
  total.nonfinite += partial.nonfinite;
}

void put(void* to, int64_t index, double value, bool wide) {
  if (wide) {
    static_cast<double*>(to)[index] = value;
  } else {
    static_cast<float*>(to)[index] = static_cast<float>(value);
  }
}

double magnitude(uint64_t bits) {
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace

void cpu_stats(const Span* spans, int64_t count, const Outputs& outputs) {
  const std::vector<Chunk> chunks = cut(spans, count);
  std::vector<Partial> partials(chunks.size());
  for_each_chunk(chunks, [&](int64_t c) {
    partials[c] = ON_THIS_CPU(stats(spans[chunks[c].span], chunks[c].begin, chunks[c].size));
  });

  Partial total{};
  int64_t first_nonfinite = -1;
  size_t c = 0;
  for (int64_t i = 0; i < count; ++i) {
    Partial tensor{};
    for (; c < chunks.size() && chunks[c].span == i; ++c) add(tensor, partials[c]);
    add(total, tensor);
    if (tensor.nonfinite && first_nonfinite < 0) first_nonfinite = i;
    if (outputs.tensor_norm) {
      put(outputs.tensor_norm, i, std::sqrt(tensor.squares), outputs.wide);
      put(outputs.tensor_largest, i, magnitude(tensor.largest), outputs.wide);
      outputs.tensor_nonfinite[i] = tensor.nonfinite;
    }
  }
  put(outputs.norm, 0, std::sqrt(total.squares), outputs.wide);
  put(outputs.largest, 0, magnitude(total.largest), outputs.wide);
  *outputs.nonfinite = total.nonfinite;
  *outputs.first_nonfinite = first_nonfinite;
}

void cpu_scale(const Span* spans, int64_t count, double coefficient) {
  const std::vector<Chunk> chunks = cut(spans, count);
  for_each_chunk(chunks, [&](int64_t c) {
    ON_THIS_CPU(scale(spans[chunks[c].span], chunks[c].begin, chunks[c].size, coefficient));
  });
}

}  // namespace ava
