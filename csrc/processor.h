// What can be told of the processor only where the program runs.
#pragma once

#include <cstdint>
#include <fstream>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>

#include <cstddef>
#endif

namespace fastgen {
namespace {

// Whether it multiplies pairs of bfloat16 and adds both products in float32.
inline bool multiplies_pairs() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512bf16");
#elif defined(__aarch64__) && defined(__linux__)
  constexpr unsigned long kBf16 = 1 << 14;  // HWCAP2_BF16, which old headers lack
  return getauxval(AT_HWCAP2) & kBf16;
#elif defined(__APPLE__)
  int present = 0;
  size_t size = sizeof present;
  return sysctlbyname("hw.optional.arm.FEAT_BF16", &present, &size, nullptr, 0) == 0 && present;
#else
  return false;
#endif
}

// Products of pairs of 16-bit integers, added in the same instruction, in vectors of AVX2.
inline bool has_avx_vnni() {
#if defined(__x86_64__)
  constexpr unsigned kAvxVnni = 1 << 4;
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & kAvxVnni);
#else
  return false;
#endif
}

// Whether it multiplies tiles of bfloat16 (AMX) and the system lets it; Clang's __builtin_cpu_supports does not know.
inline bool multiplies_tiles() {
#if defined(__x86_64__)
  constexpr unsigned kXgetbv = 1 << 27, kTilesOfBFloat16 = 1 << 22, kTileState = 3 << 17;
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & kXgetbv)) return false;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !(edx & kTilesOfBFloat16)) return false;
  asm("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
  return (eax & kTileState) == kTileState;
#else
  return false;
#endif
}

// Of the cache that cores share, or a guess of it. sysconf adds up those of other cores, on some processors.
inline int64_t shared_cache_bytes() {
  static const int64_t kibibytes = [] {
    constexpr int64_t kUsual = 16 << 10;
    int64_t read = 0;
    std::ifstream("/sys/devices/system/cpu/cpu0/cache/index3/size") >> read;  // "32768K"
    return read > 0 ? read : kUsual;
  }();
  return kibibytes << 10;
}

}  // namespace
}  // namespace fastgen
