// What a kernel may do beyond plain C++: one function per machine operation, and the only code with inline assembly.
// Header-free, so that nvcc, NVRTC and, through the emulator's implementation of the same functions, g++ compile kernels.
#pragma once
#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define PRIM __device__ __forceinline__
#include "types.cuh"
#include "math.cuh"
#include "memory.cuh"
#include "copy.cuh"
#include "mma.cuh"
#include "warp.cuh"
#include "atomic.cuh"
#include "barrier.cuh"
#if __CUDA_ARCH__ >= 900
#include "tma.cuh"
#include "wgmma.cuh"
#include "cluster.cuh"
#endif
#undef PRIM
#else
#include "emulated_prim.hpp"
#endif
