// nearest_code; arguments are checked in fastgen/ops/nearest_code.py.
#include "nearest_code.h"

namespace fastgen {
namespace {

// The last argument says what may be rounded; nothing is.
std::tuple<Tensor, Tensor> nearest_code(Tensor x, Tensor codebook, bool cosine, bool strict, int64_t) {
  const int64_t rows = x.size(0);
  Tensor indices = empty_of(x, {rows}, ScalarType::Long);
  Tensor distance;
  dispatch_float(x.scalar_type(), "nearest_code", [&](auto zero) {
    using E = decltype(zero);
    using T = ComputeType<E>;
    distance = empty_of(x, {rows}, kTypeOf<T>);
    const Codes<T> codes = codes_of<T>(codebook, cosine);
    auto* index = static_cast<int64_t*>(indices.data_ptr());
    auto* squared = static_cast<T*>(distance.data_ptr());
    search<T, E>("nearest_code", x, codes, strict, workers_for(rows),
                 [&](int64_t, int64_t row, const T*, int64_t code, T d) {
                   index[row] = code;
                   squared[row] = d;
                 });
  });
  return {indices, distance};
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) { m.impl("nearest_code", TORCH_BOX(&fastgen::nearest_code)); }
