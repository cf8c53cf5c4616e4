// The extension's CPU half on its own, so that valgrind counts its instructions and nobody else's.
//
//     grad_stats CASE        0 on success, 2 for a case that is not here
#include "../../csrc/grad_stats_cpu.cpp"

#include <cstdio>
#include <string>

namespace {

constexpr int64_t ELEMENTS = 1 << 20;

struct Tensors {
  std::vector<char> memory;
  std::vector<ava::Span> spans;

  Tensors(ava::Type type, int64_t count, bool spoilt) : memory(ELEMENTS * ava::ELEMENT_SIZE[type]) {
    // Small numbers in every type: the upper byte of a value is that of about one, the rest counts up.
    const int64_t bytes = ava::ELEMENT_SIZE[type];
    for (int64_t i = 0; i < ELEMENTS; ++i) {
      memory[i * bytes + bytes - 1] = 0x3c;
      memory[i * bytes] = static_cast<char>(i);
    }
    if (spoilt) std::memset(memory.data() + 4096, 0xff, bytes);  // NaN
    for (int64_t i = 0; i < count; ++i) {
      spans.push_back({memory.data() + ELEMENTS / count * i * bytes, ELEMENTS / count, type});
    }
  }
};

}  // namespace

// What is counted.
extern "C" __attribute__((noinline)) void measured(const Tensors& tensors, bool scale) {
  if (scale) {
    ava::cpu_scale(tensors.spans.data(), tensors.spans.size(), 0.5);
    return;
  }
  float norm, largest;
  int64_t nonfinite, first;
  const ava::Outputs outputs{&norm, &largest, &nonfinite, &first, nullptr, nullptr, nullptr, false};
  ava::cpu_stats(tensors.spans.data(), tensors.spans.size(), outputs);
}

int main(int, char** arguments) {
  const struct { const char* name; ava::Type type; int64_t count; bool spoilt, scale; } cases[] = {
    {"float32", ava::FLOAT32, 8, false, false},
    {"float64", ava::FLOAT64, 8, false, false},
    {"float16", ava::FLOAT16, 8, false, false},
    {"bfloat16", ava::BFLOAT16, 8, false, false},
    {"float32, small tensors", ava::FLOAT32, 8192, false, false},
    {"float32, not finite", ava::FLOAT32, 8, true, false},
    {"clip float32", ava::FLOAT32, 8, false, true},
    {"clip bfloat16", ava::BFLOAT16, 8, false, true},
  };
  for (const auto& each : cases) {
    if (arguments[1] && std::string(each.name) == arguments[1]) {
      measured(Tensors(each.type, each.count, each.spoilt), each.scale);
      return 0;
    }
    if (!arguments[1]) std::puts(each.name);
  }
  return arguments[1] ? 2 : 0;
}
