// Gradient statistics and clipping over a list of tensors: what the CPU and CUDA halves share with the bindings.
// No torch header here: the CUDA half must compile without one.
//
// Every tensor is cut into chunks of CHUNK elements, counted from its first: the cut depends on sizes alone, never on
// threads, blocks or addresses. A chunk yields one Partial, and partials are added in a fixed order, so the same input
// gives the same bits.
#pragma once

#include <cstdint>

namespace ava {

constexpr int64_t CHUNK = 65536;

enum Type : int32_t { FLOAT32, FLOAT64, FLOAT16, BFLOAT16 };
constexpr int64_t ELEMENT_SIZE[] = {4, 8, 2, 2};

// A tensor that fills its memory without gaps; in which order does not matter here.
struct Span {
  void* data;
  int64_t size;  // elements
  int64_t type;  // Type, as wide as the rest so that no padding hides in a span
};

struct Partial {
  double squares;       // sum of squares, as IEEE has it: NaN with a NaN, else Inf with an Inf
  uint64_t largest;     // bits of the largest magnitude as a double; as integers, NaN > Inf > finite
  int64_t nonfinite;    // how many values are NaN or infinite
};

// Where results go: the first four are one value, the last three one per tensor, or null. Norms and magnitudes are
// float, or double if `wide`.
struct Outputs {
  void* norm;
  void* largest;
  int64_t* nonfinite;
  int64_t* first_nonfinite;
  void* tensor_norm;
  void* tensor_largest;
  int64_t* tensor_nonfinite;
  bool wide;
};

inline int64_t chunks_of(int64_t size) { return (size + CHUNK - 1) / CHUNK; }

// --- CPU ---
void cpu_stats(const Span* spans, int64_t count, const Outputs& outputs);
void cpu_scale(const Span* spans, int64_t count, double coefficient);

// --- CUDA; each returns null, or what went wrong ---
// Bytes of device memory that a list of tensors needs: its chunk table, partials and a counter.
int64_t cuda_table_bytes(const Span* spans, int64_t count);
// Fills the table by kernel arguments: no copy from the host, so it neither waits nor minds being captured.
const char* cuda_fill_table(const Span* spans, int64_t count, void* table, void* stream);
const char* cuda_stats(const Span* spans, int64_t count, void* table, const Outputs& outputs, void* stream);
const char* cuda_scale(const Span* spans, int64_t count, void* table, const void* coefficient, bool wide, void* stream);
const char* cuda_is_capturing(void* stream, bool* capturing);

}  // namespace ava
