// What is not a tensor operation: which instruction sets this CPU has, and how the kernels were compiled.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <map>
#include <string>

namespace {

#if defined(__x86_64__)
// Matrix tiles need the CPU's word and, for this process, the kernel's: Linux grants it once it is asked for.
bool has_tiles() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  if ((d & kAmxBf16) == 0 || (d & kAmxTile) == 0) return false;
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

std::map<std::string, bool> cpu_features() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return {
      {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
      {"avx512", __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")},
      {"avx512_bf16", __builtin_cpu_supports("avx512bf16") != 0},
      {"amx", __builtin_cpu_supports("avx512bf16") && has_tiles()},
      // Intel issues a bf16 dot product every other cycle: no faster than a shift and two multiply-adds
      {"fast_bf16_dot", __builtin_cpu_supports("avx512bf16") && __builtin_cpu_is("amd")},
  };
#else
  return {};
#endif
}

std::map<std::string, std::string> build_info() {
  return {{"compiler", __VERSION__}, {"isas", FASTGEN_ISAS}, {"standard", std::to_string(__cplusplus)}};
}

}  // namespace

PYBIND11_MODULE(_host, module) {
  module.doc() = "CPU features and build information";
  module.def("cpu_features", &cpu_features, "Instruction sets of this CPU that fastgen has kernels for.");
  module.def("build_info", &build_info, "Compiler, language standard and compiled instruction sets.");
}
