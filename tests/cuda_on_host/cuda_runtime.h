// Enough of CUDA for g++ to compile csrc/parameter_pass/cuda.cu and run it on the host: blocks one after the other, with one
// thread each. It shows which elements are read and written and what is computed, not what threads do to one another.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#define __device__
#define __host__
#define __global__
#define __shared__
#define __grid_constant__
#define __launch_bounds__(...)
#define CUDART_VERSION 13000

using std::max;
using std::min;

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3(unsigned x = 1) : x(x) {}
};
struct uint4 {
    uint32_t x, y, z, w;
};
inline dim3 gridDim, blockDim, blockIdx(0), threadIdx(0);

// Counted for tests/test_cuda_on_host.py.
extern "C" {
inline int64_t launches = 0, vector_loads = 0, vector_stores = 0;
}

template <class T>
T __ldcs(const T* at) {
    if (reinterpret_cast<uintptr_t>(at) % sizeof(T) != 0) abort();  // as a GPU would
    return ++vector_loads, *at;
}
template <class T>
void __stcs(T* at, T value) {
    if (reinterpret_cast<uintptr_t>(at) % sizeof(T) != 0) abort();
    ++vector_stores, *at = value;
}
inline void __syncthreads() {}
inline void __threadfence() {}
inline uint32_t atomicInc(uint32_t* at, uint32_t limit) {
    const uint32_t old = *at;
    *at = old >= limit ? 0 : old + 1;
    return old;
}

enum cudaError_t { cudaSuccess };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
};

struct cudaFuncAttributes {
    size_t sharedSizeBytes;
};

constexpr int shared_bytes = 64 * 1024;
constexpr int static_shared_bytes = 16;  // of any kernel
alignas(16) uint4 shared[shared_bytes / sizeof(uint4)];

inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = shared_bytes, cudaSuccess; }
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
    return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel) {
    return attributes->sharedSizeBytes = static_shared_bytes, cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
template <class Parameters>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters), const Parameters& p) {
    if (config->dynamicSmemBytes + static_shared_bytes > shared_bytes) abort();
    ++launches;
    gridDim = config->gridDim;
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) kernel(p);
    return cudaSuccess;
}
