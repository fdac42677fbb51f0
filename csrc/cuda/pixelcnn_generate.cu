// Launches of pixelcnn_generate.cuh.
#include "launch.cuh"
#include "pixelcnn_generate.cuh"

namespace fastgen::pixelcnn {
namespace {

template <class W>
__global__ void __launch_bounds__(kThreads, 1) draw(const __grid_constant__ Job job) {
  Images<W>(job).draw();
}

Launch<Job> launch_of(const Job& job, bool bf16, void* stream) {
  const int64_t groups = (job.images + job.images_each - 1) / job.images_each;
  const auto kernel = bf16 ? draw<uint16_t> : draw<float>;
  // more than eight blocks in a cluster are not there on every GPU that has clusters: `active` tells
  cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  return {kernel, job.cluster, groups, kThreads, job.shared_bytes(kThreads, bf16 ? 2 : 4), stream};
}

}  // namespace

int active(const Job& job, bool bf16) { return launch_of(job, bf16, nullptr).active(); }

int launch(const Job& job, bool bf16, void* stream) { return launch_of(job, bf16, stream).run(job); }

}  // namespace fastgen::pixelcnn
