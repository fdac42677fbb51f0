// Launches of both kernels of pixelcnn_images.cuh.
#include "launch.cuh"
#include "pixelcnn_pixels.cuh"
#include "pixelcnn_rows.cuh"

namespace fastgen::pixelcnn {
namespace {

template <class W>
__global__ void __launch_bounds__(kRowThreads, 1) draw_rows(const __grid_constant__ Job job) {
  Rows<W>(job).draw();
}
template <class W>
__global__ void __launch_bounds__(kPixelThreads, 1) draw_pixels(const __grid_constant__ Job job) {
  Pixels<W>(job).draw();
}

Launch<Job> launch_of(const Job& job, bool bf16, bool rows, void* stream) {
  const auto kernel = rows   ? bf16 ? draw_rows<uint16_t> : draw_rows<float>
                        : bf16 ? draw_pixels<uint16_t>
                             : draw_pixels<float>;
  const int cluster = rows ? job.row_cluster : job.cluster, images = rows ? job.row_images : job.images_each;
  // not there on every GPU that has clusters: `active` tells
  if (cluster > 8) cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  const int threads = rows ? kRowThreads : kPixelThreads;
  const int64_t bytes = rows ? job.row_bytes(threads) : job.pixel_bytes(threads, bf16 ? 2 : 4);
  return {kernel, cluster, images ? (job.images + images - 1) / images : 1, threads, bytes, stream};
}

}  // namespace

int active(const Job& job, bool bf16, bool rows) { return launch_of(job, bf16, rows, nullptr).active(); }

int launch(const Job& job, bool bf16, bool rows, void* stream) { return launch_of(job, bf16, rows, stream).run(job); }

}  // namespace fastgen::pixelcnn
