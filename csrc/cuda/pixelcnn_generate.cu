// Launches of pixelcnn_generate.cuh.
#include "launch.cuh"
#include "pixelcnn_generate.cuh"

namespace fastgen::pixelcnn {
namespace {

template <int M, class W>
__global__ void __launch_bounds__(kThreads, 1) draw(const __grid_constant__ Job job) {
  Images<M, W>(job).draw();
}

using Kernel = void (*)(Job);

template <class W>
Kernel of(int columns) {
  return columns == 4 ? draw<1, W> : draw<kMostColumns / 4, W>;
}

Launch<Job> launch_of(const Job& job, int columns, bool bf16, void* stream) {
  const int64_t groups = (job.images + job.images_each - 1) / job.images_each;
  const Kernel kernel = bf16 ? of<uint16_t>(columns) : of<float>(columns);
  return {kernel, job.cluster, groups, kThreads, job.shared_bytes(columns, kThreads), stream};
}

}  // namespace

int active(const Job& job, int columns, bool bf16) { return launch_of(job, columns, bf16, nullptr).active(); }

int launch(const Job& job, int columns, bool bf16, void* stream) {
  return launch_of(job, columns, bf16, stream).run(job);
}

}  // namespace fastgen::pixelcnn
