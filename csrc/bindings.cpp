// The extension's operations, over torch's stable ABI alone: one library for every torch from 2.10 on and every Python.
//
// ava_kernels/gradients/op.py declares them, describes their results, and checks their arguments.

#include "grad_stats.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <list>
#include <mutex>
#include <tuple>
#include <utility>
#include <vector>

namespace {

using ava::Span;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Stats = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

ava::Type type_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return ava::FLOAT32;
    case ScalarType::Double: return ava::FLOAT64;
    case ScalarType::Half: return ava::FLOAT16;
    case ScalarType::BFloat16: return ava::BFLOAT16;
    default: STD_TORCH_CHECK(false, "tensors must be float32, float64, float16 or bfloat16");
  }
}

// Whether the elements fill their memory without gaps or overlaps, in whatever order.
bool is_dense(const Tensor& tensor) {
  if (tensor.is_contiguous()) return true;
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 0) return true;
    if (sizes[d] > 1) dims.emplace_back(strides[d], sizes[d]);
  }
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

// The spans of a list of tensors, and contiguous copies of those that are not dense.
struct Spans {
  std::vector<Span> spans;
  std::vector<std::pair<size_t, Tensor>> copies;  // which tensor, its copy
  bool wide = false;                              // some tensor is float64

  explicit Spans(const Tensors& tensors) {
    spans.reserve(tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i) {
      Tensor tensor = tensors[i];
      if (!is_dense(tensor)) {
        tensor = torch::stable::contiguous(tensor);
        copies.emplace_back(i, tensor);
      }
      spans.push_back({tensor.data_ptr(), tensor.numel(), type_of(tensor)});
      wide |= spans.back().type == ava::FLOAT64;
    }
  }

  int64_t count() const { return static_cast<int64_t>(spans.size()); }
};

struct Results {
  Stats tensors;
  ava::Outputs pointers;
};

Results make_results(const Tensor& like, int64_t count, bool wide, bool per_tensor) {
  const auto make = [&](std::vector<int64_t> size, ScalarType type) {
    return torch::stable::new_empty(like, size, type);
  };
  const ScalarType real = wide ? ScalarType::Double : ScalarType::Float;
  const std::vector<int64_t> each{per_tensor ? count : 0};
  const Stats made{make({}, real),   make({}, real),   make({}, ScalarType::Long),  make({}, ScalarType::Long),
                   make(each, real), make(each, real), make(each, ScalarType::Long)};
  const auto& [norm, largest, nonfinite, first, tensor_norm, tensor_largest, tensor_nonfinite] = made;
  ava::Outputs pointers{};
  pointers.norm = norm.data_ptr();
  pointers.largest = largest.data_ptr();
  pointers.nonfinite = static_cast<int64_t*>(nonfinite.data_ptr());
  pointers.first_nonfinite = static_cast<int64_t*>(first.data_ptr());
  pointers.wide = wide;
  if (per_tensor) {
    pointers.tensor_norm = tensor_norm.data_ptr();
    pointers.tensor_largest = tensor_largest.data_ptr();
    pointers.tensor_nonfinite = static_cast<int64_t*>(tensor_nonfinite.data_ptr());
  }
  return {made, pointers};
}

void put_back(const Spans& given, const Tensors& tensors) {
  for (const auto& [index, copy] : given.copies) {
    Tensor tensor = tensors[index];
    torch::stable::copy_(tensor, copy);
  }
}

Stats cpu_grad_stats(Tensors tensors, bool per_tensor) {
  const Spans given(tensors);
  const Results results = make_results(tensors[0], given.count(), given.wide, per_tensor);
  ava::cpu_stats(given.spans.data(), given.count(), results.pointers);
  return results.tensors;
}

void cpu_clip_(Tensors tensors, Tensor coefficient) {
  const double factor = type_of(coefficient) == ava::FLOAT64 ? *static_cast<const double*>(coefficient.data_ptr())
                                                             : *static_cast<const float*>(coefficient.data_ptr());
  if (factor == 1) return;
  const Spans given(tensors);
  ava::cpu_scale(given.spans.data(), given.count(), factor);
  put_back(given, tensors);
}

#ifdef USE_CUDA

void check(const char* error) { STD_TORCH_CHECK(error == nullptr, "gradient statistics on CUDA: ", error); }

// A list of tensors as the device sees it. Made once per list, as a training step's gradients mostly lie where they
// lay a step ago. Its memory belongs to the stream that made it, so that torch may give it away when it is dropped
// while the stream still reads it.
struct Table {
  int32_t device;
  void* stream;
  std::vector<Span> spans;
  Tensor memory;
};

constexpr size_t TABLES_KEPT = 16;

bool same(const std::vector<Span>& a, const std::vector<Span>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(Span)) == 0;
}

Tensor make_table(const Tensor& like, const std::vector<Span>& spans, void* stream) {
  const int64_t count = static_cast<int64_t>(spans.size());
  const std::vector<int64_t> bytes{ava::cuda_table_bytes(spans.data(), count)};
  Tensor memory = torch::stable::new_empty(like, bytes, ScalarType::Byte);
  check(ava::cuda_fill_table(spans.data(), count, memory.data_ptr(), stream));
  return memory;
}

// A captured launch gets a table of its own, in the graph's memory and filled by the graph: one kept here could be
// dropped before the graph is replayed, and one filled by the graph is empty until then.
Tensor table_for(const Tensor& like, const std::vector<Span>& spans, void* stream) {
  bool capturing = false;
  check(ava::cuda_is_capturing(stream, &capturing));
  if (capturing) return make_table(like, spans, stream);

  static std::mutex mutex;
  static auto& tables = *new std::list<Table>();  // latest first; never freed, as CUDA may be gone by then
  const std::lock_guard<std::mutex> lock(mutex);
  const int32_t device = like.get_device_index();
  for (auto table = tables.begin(); table != tables.end(); ++table) {
    if (table->device == device && table->stream == stream && same(table->spans, spans)) {
      tables.splice(tables.begin(), tables, table);
      return table->memory;
    }
  }
  tables.push_front({device, stream, spans, make_table(like, spans, stream)});
  if (tables.size() > TABLES_KEPT) tables.pop_back();
  return tables.front().memory;
}

void* current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}

Stats cuda_grad_stats(Tensors tensors, bool per_tensor) {
  const torch::stable::accelerator::DeviceGuard guard(tensors[0].get_device_index());
  void* stream = current_stream(tensors[0]);
  const Spans given(tensors);
  const Results results = make_results(tensors[0], given.count(), given.wide, per_tensor);
  const Tensor table = table_for(tensors[0], given.spans, stream);
  check(ava::cuda_stats(given.spans.data(), given.count(), table.data_ptr(), results.pointers, stream));
  return results.tensors;
}

void cuda_clip_(Tensors tensors, Tensor coefficient) {
  const torch::stable::accelerator::DeviceGuard guard(tensors[0].get_device_index());
  void* stream = current_stream(tensors[0]);
  const Spans given(tensors);
  const Tensor table = table_for(tensors[0], given.spans, stream);
  const bool wide = type_of(coefficient) == ava::FLOAT64;
  check(ava::cuda_scale(
      given.spans.data(), given.count(), table.data_ptr(), coefficient.data_ptr(), wide, stream));
  put_back(given, tensors);
}

#endif  // USE_CUDA

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ava_kernels, CPU, m) {
  m.impl("grad_stats", TORCH_BOX(&cpu_grad_stats));
  m.impl("clip_", TORCH_BOX(&cpu_clip_));
}

#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(ava_kernels, CUDA, m) {
  m.impl("grad_stats", TORCH_BOX(&cuda_grad_stats));
  m.impl("clip_", TORCH_BOX(&cuda_clip_));
}
#endif
