// How one scalar loop becomes fast on every x86-64 without becoming unsafe on any.
//
// A kernel is a struct with `template <class Isa> void operator()(int64_t begin, int64_t end) const`, marked
// MAMLFAST_INLINE, whose loops carry `omp simd`. `over` inlines it three times, into functions compiled for
// AVX-512, for AVX2 with FMA and for the baseline, picks one by what the processor reports, and shares the
// range among torch's own threads. So a wheel built anywhere runs anywhere, at full width where there is one.
// On other processors the baseline is all there is, and `omp simd` does what it can there.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <cstdlib>
#include <string_view>

#define MAMLFAST_INLINE inline __attribute__((always_inline))

namespace mamlfast {

// Whether `a * b + c` is one instruction; where it is not, std::fma would be a library call.
struct WithFma {
  template <class T>
  static MAMLFAST_INLINE T madd(T a, T b, T c) {
    return __builtin_fma(a, b, c);
  }
  static MAMLFAST_INLINE float madd(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
};

struct WithoutFma {
  template <class T>
  static MAMLFAST_INLINE T madd(T a, T b, T c) {
    return a * b + c;
  }
};

#if defined(__FMA__) || defined(__aarch64__)
using Baseline = WithFma;
#else
using Baseline = WithoutFma;
#endif

// By value, here and below: a copy of one's own cannot alias what the loops write, so its members stay in registers.
template <class Kernel>
void run_baseline(const Kernel kernel, int64_t begin, int64_t end) {
  kernel.template operator()<Baseline>(begin, end);
}

#if defined(__x86_64__) && defined(__GNUC__)

#if defined(__clang__)
#define MAMLFAST_AVX512 "avx512f,avx512vl,avx512dq,avx512bw,avx2,fma"
#else
// GCC would otherwise keep to half the width.
#define MAMLFAST_AVX512 "avx512f,avx512vl,avx512dq,avx512bw,avx2,fma,prefer-vector-width=512"
#endif

template <class Kernel>
__attribute__((target(MAMLFAST_AVX512))) void run_avx512(const Kernel kernel, int64_t begin, int64_t end) {
  kernel.template operator()<WithFma>(begin, end);
}

template <class Kernel>
__attribute__((target("avx2,fma"))) void run_avx2(const Kernel kernel, int64_t begin, int64_t end) {
  kernel.template operator()<WithFma>(begin, end);
}

enum class Width { kBaseline, kAvx2, kAvx512 };

// What the processor has, at most what ATEN_CPU_CAPABILITY (default, avx2, avx512) allows, as in torch.
inline Width width() {
  static const Width found = [] {
    const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
    const std::string_view allowed = variable ? variable : "avx512";
    const bool narrow = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool wide = narrow && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
    if (!narrow || allowed == "default") return Width::kBaseline;
    return wide && allowed != "avx2" ? Width::kAvx512 : Width::kAvx2;
  }();
  return found;
}

template <class Kernel>
void run(const Kernel& kernel, int64_t begin, int64_t end) {
  switch (width()) {
    case Width::kAvx512:
      return run_avx512(kernel, begin, end);
    case Width::kAvx2:
      return run_avx2(kernel, begin, end);
    case Width::kBaseline:
      return run_baseline(kernel, begin, end);
  }
}

#else

template <class Kernel>
void run(const Kernel& kernel, int64_t begin, int64_t end) {
  run_baseline(kernel, begin, end);
}

#endif

// Calls `kernel` on [0, count) in pieces, on as many threads as torch.set_num_threads allows; a piece is worth
// starting a thread for when it holds about 16k elements, `cost` of them an item.
template <class Kernel>
void over(int64_t count, int64_t cost, const Kernel& kernel) {
  const int64_t grain = 1 + 16384 / (cost + 1);
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { run(kernel, begin, end); });
}

}  // namespace mamlfast
