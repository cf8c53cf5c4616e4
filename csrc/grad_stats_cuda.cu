// Gradient statistics and clipping on CUDA: one launch over all chunks of all tensors, 16 bytes a load.
//
// Precision. A thread squares 64 bytes at a time in float, then adds their sum to a double. A batch whose largest
// magnitude is outside [2^-40, 2^60], where float squares would vanish or overflow, is squared in double instead, from
// the same registers; NaN and Inf are outside too, and counted there. So the fast path costs one conversion and one
// double addition per 64 bytes, and nothing is lost up to the largest float.
//
// Order. Which thread adds which elements depends on the chunk alone, not on its address or on the grid; a block adds
// its threads' sums in a fixed tree, and the block that finishes last adds the chunks' partials in a fixed order. Which
// block that is varies, its result does not.

#include "grad_stats.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>

namespace ava {
namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32, LOADS = 4;
constexpr int SPANS_A_LAUNCH = 160;  // kernel arguments may hold 4 KiB
constexpr int64_t SCALE_BLOCKS = 4096;
constexpr uint64_t INFINITE = 0x7ff0000000000000;

struct __align__(16) Entry {
  const void* data;
  uint32_t tensor;
  uint32_t size_and_type;  // size in the low 24 bits
};

// Where the parts of a table lie in its memory.
struct Table {
  Entry* chunks;
  Partial* partials;
  int64_t* first_chunk;  // of each tensor, then their number
  uint32_t* blocks_done;

  Table(void* memory, int64_t count, int64_t tensors) {
    chunks = static_cast<Entry*>(memory);
    partials = reinterpret_cast<Partial*>(chunks + count);
    first_chunk = reinterpret_cast<int64_t*>(partials + count);
    blocks_done = reinterpret_cast<uint32_t*>(first_chunk + tensors + 1);
  }
};

int64_t count_chunks(const Span* spans, int64_t count) {
  int64_t chunks = 0;
  for (int64_t i = 0; i < count; ++i) chunks += chunks_of(spans[i].size);
  return chunks;
}

struct SpansArgument {
  Span spans[SPANS_A_LAUNCH];  // 24 bytes each
  int64_t first_tensor;
  int64_t first_chunk;
};
static_assert(sizeof(SpansArgument) + sizeof(Table) + 16 <= 4096);

// Block b writes the entries of the b-th tensor of this launch.
__global__ void fill(const __grid_constant__ SpansArgument given, Table table) {
  int64_t chunk = given.first_chunk;
  for (int i = 0; i < blockIdx.x; ++i) chunk += (given.spans[i].size + CHUNK - 1) / CHUNK;
  const Span span = given.spans[blockIdx.x];
  const int64_t tensor = given.first_tensor + blockIdx.x, count = (span.size + CHUNK - 1) / CHUNK;
  const int64_t element = span.type == FLOAT64 ? 8 : span.type == FLOAT32 ? 4 : 2;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
    const int64_t size = min(CHUNK, span.size - i * CHUNK);
    table.chunks[chunk + i] = {
        static_cast<const char*>(span.data) + i * CHUNK * element,
        static_cast<uint32_t>(tensor),
        static_cast<uint32_t>(size) | static_cast<uint32_t>(span.type) << 24,
    };
  }
  if (threadIdx.x == 0) {
    table.first_chunk[tensor] = chunk;
    table.first_chunk[tensor + 1] = chunk + count;
    *table.blocks_done = 0;
  }
}

// --- loading ---

template <typename T>
struct alignas(16) Vector {
  static constexpr int SIZE = 16 / sizeof(T);
  T values[SIZE];
};

// Elements x[begin …], zeros behind the end. Where x is not aligned, the same elements by narrow loads.
template <typename T>
__device__ Vector<T> load(const T* x, int begin, int size, bool aligned) {
  Vector<T> vector;
  if (aligned && begin + Vector<T>::SIZE <= size) {
    const uint4 raw = __ldcs(reinterpret_cast<const uint4*>(x + begin));
    memcpy(&vector, &raw, 16);
  } else {
#pragma unroll
    for (int i = 0; i < Vector<T>::SIZE; ++i) vector.values[i] = begin + i < size ? x[begin + i] : T(0.0f);
  }
  return vector;
}

template <typename T>
__device__ void store(T* x, int begin, int size, bool aligned, const Vector<T>& vector) {
  if (aligned && begin + Vector<T>::SIZE <= size) {
    uint4 raw;
    memcpy(&raw, &vector, 16);
    __stcs(reinterpret_cast<uint4*>(x + begin), raw);
  } else {
#pragma unroll
    for (int i = 0; i < Vector<T>::SIZE; ++i) {
      if (begin + i < size) x[begin + i] = vector.values[i];
    }
  }
}

__device__ bool is_aligned(const void* pointer) { return reinterpret_cast<uint64_t>(pointer) % 16 == 0; }

// --- statistics ---

struct Sums {
  double squares = 0;
  uint64_t largest64 = 0;  // float64 tensors
  uint32_t largest = 0;    // others, as the bits of a float
  uint32_t nonfinite = 0;
};

template <typename T>
__device__ void add(Sums& sums, const Vector<T> (&batch)[LOADS]) {
  float squares = 0;
  uint32_t largest = 0;
#pragma unroll
  for (int j = 0; j < LOADS; ++j) {
    float part = 0;
#pragma unroll
    for (int i = 0; i < Vector<T>::SIZE; ++i) {
      const float value = static_cast<float>(batch[j].values[i]);
      part = fmaf(value, value, part);
      largest = max(largest, __float_as_uint(value) & 0x7fffffffu);
    }
    squares += part;
  }
  sums.largest = max(sums.largest, largest);
  // In [2^-40, 2^60], or all zero: one unsigned comparison each.
  if (largest - (87u << 23) <= (100u << 23) || largest == 0) {
    sums.squares += static_cast<double>(squares);
    return;
  }
#pragma unroll
  for (int j = 0; j < LOADS; ++j) {
#pragma unroll
    for (int i = 0; i < Vector<T>::SIZE; ++i) {
      const float value = static_cast<float>(batch[j].values[i]);
      sums.squares += static_cast<double>(value) * static_cast<double>(value);
      sums.nonfinite += (__float_as_uint(value) & 0x7f800000u) == 0x7f800000u;
    }
  }
}

__device__ void add(Sums& sums, const Vector<double> (&batch)[LOADS]) {
#pragma unroll
  for (int j = 0; j < LOADS; ++j) {
#pragma unroll
    for (int i = 0; i < Vector<double>::SIZE; ++i) {
      const double value = batch[j].values[i];
      const uint64_t bits = __double_as_longlong(value) & 0x7fffffffffffffff;
      sums.squares = fma(value, value, sums.squares);
      sums.largest64 = max(sums.largest64, bits);
      sums.nonfinite += bits >= INFINITE;
    }
  }
}

template <typename T>
__device__ void add_chunk(Sums& sums, const T* x, int size) {
  constexpr int STEP = THREADS * Vector<T>::SIZE;
  const bool aligned = is_aligned(x);
  for (int begin = threadIdx.x * Vector<T>::SIZE; begin < size; begin += LOADS * STEP) {
    Vector<T> batch[LOADS];
#pragma unroll
    for (int j = 0; j < LOADS; ++j) batch[j] = load(x, begin + j * STEP, size, aligned);
    add(sums, batch);
  }
}

__device__ void add(Partial& total, const Partial& partial) {
  total.squares += partial.squares;
  total.largest = max(total.largest, partial.largest);
  total.nonfinite += partial.nonfinite;
}

__device__ Partial add_lanes(Partial partial) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    add(partial,
        {__shfl_xor_sync(~0u, partial.squares, distance),
         __shfl_xor_sync(~0u, static_cast<unsigned long long>(partial.largest), distance),
         __shfl_xor_sync(~0u, static_cast<long long>(partial.nonfinite), distance)});
  }
  return partial;
}

// The block's sum, in thread 0.
__device__ Partial add_threads(Partial partial) {
  __shared__ Partial warps[WARPS];
  partial = add_lanes(partial);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = partial;
  __syncthreads();
  if (threadIdx.x == 0) {
#pragma unroll
    for (int w = 1; w < WARPS; ++w) add(partial, warps[w]);
  }
  __syncthreads();
  return partial;
}

// Written by another block of this launch, so past the first-level cache.
__device__ Partial read(const Partial* partial) {
  return {__ldcg(&partial->squares),
          __ldcg(reinterpret_cast<const unsigned long long*>(&partial->largest)),
          __ldcg(reinterpret_cast<const long long*>(&partial->nonfinite))};
}

__device__ void put(void* to, int64_t index, double value, bool wide) {
  if (wide) {
    static_cast<double*>(to)[index] = value;
  } else {
    static_cast<float*>(to)[index] = static_cast<float>(value);
  }
}

__device__ void finish(const Table& table, int64_t chunks, const Outputs& outputs) {
  constexpr uint32_t NONE = ~0u;
  __shared__ uint32_t first_nonfinite;
  if (threadIdx.x == 0) first_nonfinite = NONE;
  __syncthreads();
  Partial total{};
#pragma unroll 4
  for (int64_t c = threadIdx.x; c < chunks; c += THREADS) {
    const Partial partial = read(table.partials + c);
    add(total, partial);
    if (partial.nonfinite) atomicMin(&first_nonfinite, table.chunks[c].tensor);
  }
  total = add_threads(total);
  if (threadIdx.x == 0) {
    put(outputs.norm, 0, sqrt(total.squares), outputs.wide);
    put(outputs.largest, 0, __longlong_as_double(total.largest), outputs.wide);
    *outputs.nonfinite = total.nonfinite;
    *outputs.first_nonfinite = first_nonfinite == NONE ? -1 : static_cast<int64_t>(first_nonfinite);
    *table.blocks_done = 0;  // for the next launch
  }
}

// Block c sums chunk c, and the block that is done last sums the chunks.
__global__ void __launch_bounds__(THREADS, 4) stats(Table table, int64_t chunks, Outputs outputs) {
  Sums sums;
  if (blockIdx.x < chunks) {
    const Entry entry = table.chunks[blockIdx.x];
    const int size = entry.size_and_type & 0xffffff;
    switch (entry.size_and_type >> 24) {
      case FLOAT32: add_chunk(sums, static_cast<const float*>(entry.data), size); break;
      case FLOAT64: add_chunk(sums, static_cast<const double*>(entry.data), size); break;
      case FLOAT16: add_chunk(sums, static_cast<const __half*>(entry.data), size); break;
      default: add_chunk(sums, static_cast<const __nv_bfloat16*>(entry.data), size);
    }
  }
  const uint64_t narrow = __double_as_longlong(static_cast<double>(__uint_as_float(sums.largest)));
  const Partial partial = add_threads({sums.squares, max(narrow, sums.largest64), sums.nonfinite});
  __shared__ bool is_last;
  if (threadIdx.x == 0) {
    if (blockIdx.x < chunks) table.partials[blockIdx.x] = partial;
    __threadfence();
    is_last = atomicAdd(table.blocks_done, 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (is_last) {
    __threadfence();
    finish(table, chunks, outputs);
  }
}

// One warp a tensor.
__global__ void __launch_bounds__(THREADS) tensor_stats(Table table, int64_t tensors, Outputs outputs) {
  const int64_t tensor = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / 32;
  if (tensor >= tensors) return;
  Partial total{};
  const int64_t end = table.first_chunk[tensor + 1];
  for (int64_t c = table.first_chunk[tensor] + threadIdx.x % 32; c < end; c += 32) add(total, table.partials[c]);
  total = add_lanes(total);
  if (threadIdx.x % 32 == 0) {
    put(outputs.tensor_norm, tensor, sqrt(total.squares), outputs.wide);
    put(outputs.tensor_largest, tensor, __longlong_as_double(total.largest), outputs.wide);
    outputs.tensor_nonfinite[tensor] = total.nonfinite;
  }
}

// --- clipping ---

template <typename T>
__device__ void scale_chunk(T* x, int size, double coefficient) {
  constexpr int STEP = THREADS * Vector<T>::SIZE;
  const bool aligned = is_aligned(x);
  for (int begin = threadIdx.x * Vector<T>::SIZE; begin < size; begin += LOADS * STEP) {
    Vector<T> batch[LOADS];
#pragma unroll
    for (int j = 0; j < LOADS; ++j) batch[j] = load(x, begin + j * STEP, size, aligned);
#pragma unroll
    for (int j = 0; j < LOADS; ++j) {
#pragma unroll
      for (int i = 0; i < Vector<T>::SIZE; ++i) {
        T& value = batch[j].values[i];
        if constexpr (sizeof(T) == 8) {
          value *= coefficient;
        } else {
          value = static_cast<T>(static_cast<float>(value) * static_cast<float>(coefficient));
        }
      }
    }
#pragma unroll
    for (int j = 0; j < LOADS; ++j) store(x, begin + j * STEP, size, aligned, batch[j]);
  }
}

__global__ void __launch_bounds__(THREADS, 4) scale(Table table, int64_t chunks, const void* factor, bool wide) {
  const double coefficient = wide ? *static_cast<const double*>(factor) : *static_cast<const float*>(factor);
  if (coefficient == 1) return;
  for (int64_t c = blockIdx.x; c < chunks; c += gridDim.x) {
    const Entry entry = table.chunks[c];
    void* data = const_cast<void*>(entry.data);
    const int size = entry.size_and_type & 0xffffff;
    switch (entry.size_and_type >> 24) {
      case FLOAT32: scale_chunk(static_cast<float*>(data), size, coefficient); break;
      case FLOAT64: scale_chunk(static_cast<double*>(data), size, coefficient); break;
      case FLOAT16: scale_chunk(static_cast<__half*>(data), size, coefficient); break;
      default: scale_chunk(static_cast<__nv_bfloat16*>(data), size, coefficient);
    }
  }
}

const char* launched() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

int64_t cuda_table_bytes(const Span* spans, int64_t count) {
  const int64_t chunks = count_chunks(spans, count);
  return chunks * (sizeof(Entry) + sizeof(Partial)) + (count + 1) * sizeof(int64_t) + sizeof(uint32_t);
}

const char* cuda_fill_table(const Span* spans, int64_t count, void* memory, void* stream) {
  const Table table(memory, count_chunks(spans, count), count);
  SpansArgument given;
  given.first_chunk = 0;
  for (int64_t first = 0; first < count; first += SPANS_A_LAUNCH) {
    const int64_t here = std::min<int64_t>(SPANS_A_LAUNCH, count - first);
    std::copy_n(spans + first, here, given.spans);
    given.first_tensor = first;
    fill<<<static_cast<unsigned>(here), 64, 0, static_cast<cudaStream_t>(stream)>>>(given, table);
    if (const char* error = launched()) return error;
    given.first_chunk += count_chunks(spans + first, here);
  }
  return nullptr;
}

const char* cuda_stats(const Span* spans, int64_t count, void* memory, const Outputs& outputs, void* stream) {
  const int64_t chunks = count_chunks(spans, count);
  const Table table(memory, chunks, count);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const unsigned blocks = static_cast<unsigned>(std::max<int64_t>(chunks, 1));  // empty tensors need an answer too
  stats<<<blocks, THREADS, 0, cuda_stream>>>(table, chunks, outputs);
  if (outputs.tensor_norm) {
    const unsigned warps = static_cast<unsigned>((count + WARPS - 1) / WARPS);
    tensor_stats<<<warps, THREADS, 0, cuda_stream>>>(table, count, outputs);
  }
  return launched();
}

const char* cuda_scale(
    const Span* spans, int64_t count, void* memory, const void* coefficient, bool wide, void* stream) {
  const int64_t chunks = count_chunks(spans, count);
  if (chunks == 0) return nullptr;
  const unsigned blocks = static_cast<unsigned>(std::min(chunks, SCALE_BLOCKS));
  scale<<<blocks, THREADS, 0, static_cast<cudaStream_t>(stream)>>>(
      Table(memory, chunks, count), chunks, coefficient, wide);
  return launched();
}

const char* cuda_is_capturing(void* stream, bool* capturing) {
  cudaStreamCaptureStatus status;
  const cudaError_t error = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status);
  *capturing = status != cudaStreamCaptureStatusNone;
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace ava
