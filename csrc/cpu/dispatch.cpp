#include "cpu/dispatch.h"

#include <atomic>

#include "common/check.h"

#if GUDA_FAST_WITH_AVX2
#include <cpuid.h>
#endif

namespace guda_fast::cpu {
namespace {

#define GUDA_FAST_KERNELS(set)                                                                             \
  Kernels {                                                                                                \
    #set, set::noise_words, set::add_noise,                                                                \
        {set::error_sum<Dtype::float32>, set::error_sum<Dtype::bfloat16>, set::error_sum<Dtype::float16>}, \
        {set::paired_sum<Dtype::float32>, set::paired_sum<Dtype::bfloat16>,                                \
         set::paired_sum<Dtype::float16>},                                                                 \
        {set::channel_sums<Dtype::float32>, set::channel_sums<Dtype::bfloat16>}, set::finish_norm,         \
        {{set::normalize<Dtype::float32, false>, set::normalize<Dtype::float32, true>},                    \
         {set::normalize<Dtype::bfloat16, false>, set::normalize<Dtype::bfloat16, true>}},                 \
        {set::pack_keys<Dtype::float32>, set::pack_keys<Dtype::bfloat16>},                                 \
        {set::attend<Dtype::float32>, set::attend<Dtype::bfloat16>}, set::transform_weights,               \
        set::transform_tile, set::multiply_points, set::gather_tile,                                       \
  }

struct Candidate {
  Kernels kernels;
  bool (*runs_here)();
};

#if GUDA_FAST_WITH_AVX2
// Clang 14 refuses __builtin_cpu_supports("f16c").
bool has_f16c() {
  unsigned int eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

// Each test covers every flag that the set's files are compiled with.
const Candidate kCandidates[] = {
    {GUDA_FAST_KERNELS(baseline), [] { return true; }},
#if GUDA_FAST_WITH_AVX2
    {GUDA_FAST_KERNELS(avx2),
     [] { return __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0 && has_f16c(); }},
#endif
#if GUDA_FAST_WITH_AVX512
    {GUDA_FAST_KERNELS(avx512),
     [] {
       return __builtin_cpu_supports("avx512f") != 0 && __builtin_cpu_supports("avx512bw") != 0 &&
              __builtin_cpu_supports("avx512dq") != 0 && __builtin_cpu_supports("avx512vl") != 0;
     }},
#endif
};
#undef GUDA_FAST_KERNELS

const Kernels* best() {
  const Kernels* chosen = nullptr;
  for (const Candidate& candidate : kCandidates) {
    if (candidate.runs_here()) chosen = &candidate.kernels;
  }
  return chosen;
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> kernels{best()};
  return kernels;
}

}  // namespace

std::vector<std::string> built_instruction_sets() {
  std::vector<std::string> names;
  for (const Candidate& candidate : kCandidates) names.emplace_back(candidate.kernels.name);
  return names;
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Candidate& candidate : kCandidates) {
    if (candidate.runs_here()) names.emplace_back(candidate.kernels.name);
  }
  return names;
}

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }

void set_instruction_set(const std::string& name) {
  std::string choices;
  for (const Candidate& candidate : kCandidates) {
    if (!candidate.runs_here()) continue;
    if (name == candidate.kernels.name) {
      current().store(&candidate.kernels, std::memory_order_relaxed);
      return;
    }
    choices += join(choices.empty() ? "" : ", ", "'", candidate.kernels.name, "'");
  }
  require(false, "set_instruction_set: name must be one of ", choices, ", got '", name, "'");
}

}  // namespace guda_fast::cpu
