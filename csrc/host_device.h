// Marks functions that run on the CPU and, where nvcc compiles them, on a GPU too.
#pragma once

#ifdef __CUDACC__
#define FASTGEN_HOST_DEVICE __host__ __device__
#else
#define FASTGEN_HOST_DEVICE
#endif
