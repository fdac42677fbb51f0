// What is not a tensor operation: which instruction sets this CPU has, and how the kernels were compiled.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "processor.h"

namespace {

std::map<std::string, bool> cpu_features() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return {
      {"avx2", avx2},
      {"avx2_vnni", avx2 && fastgen::has_avx_vnni()},
      {"avx512", __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")},
      {"avx512_vnni", __builtin_cpu_supports("avx512vnni") != 0},
      {"avx512_bf16", fastgen::multiplies_pairs()},
      {"amx_bf16", fastgen::multiplies_tiles()},
  };
#elif defined(__aarch64__)
  return {{"arm_bf16", fastgen::multiplies_pairs()}};
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
