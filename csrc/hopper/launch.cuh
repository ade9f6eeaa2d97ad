// How the host describes tensors to TMA and launches a product.
#pragma once

#include <string>

#include "layer.h"
#include "parts.cuh"
#include "product.cuh"
#include "rows.cuh"

namespace ewa::hopper {

// [experts][rows][columns] of a 16-bit type, or float32; strides in elements. A box's rows are 128 bytes.
struct Operand3d {
    const void* data;
    int64_t columns, rows, experts, row_stride, expert_stride;
    bool is_float32 = false;

    int itemsize() const { return is_float32 ? 4 : 2; }
};

}  // namespace ewa::hopper

#ifndef __CUDACC__
#include "launch_on_host.h"
#else

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>

namespace ewa::hopper {

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// A function of the driver's, so that nothing is linked with it; looked up once for each `Function`.
template <class Function>
Function driver(const char* name, std::string& error) {
    static std::atomic<Function> found{nullptr};
    if (found.load() == nullptr) {
        void* entry = nullptr;
        auto result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
        const cudaError_t failed = cudaGetDriverEntryPointByVersion(name, &entry, 12000, cudaEnableDefault, &result);
#else
        const cudaError_t failed = cudaGetDriverEntryPoint(name, &entry, cudaEnableDefault, &result);
#endif
        if (failed != cudaSuccess)
            error = cudaGetErrorString(failed);
        else if (result != cudaDriverEntryPointSuccess)
            error = std::string("the driver has no ") + name + ": it must be of CUDA 12.0 or later";
        else
            found.store(reinterpret_cast<Function>(entry));
    }
    return found.load();
}

using CurrentContext = CUresult (*)(CUcontext*);

// Before anything else: without a context no tensor is described, and this thread may have none yet. One that somebody
// else has made current stays.
inline std::string choose(const Where& where) {
    std::string error;
    const auto current = driver<CurrentContext>("cuCtxGetCurrent", error);
    if (current == nullptr) return error;
    CUcontext context = nullptr;
    int device = -1;
    cudaError_t failed = cudaSuccess;
    if (current(&context) == CUDA_SUCCESS && context != nullptr) failed = cudaGetDevice(&device);
    if (failed == cudaSuccess && device != where.device) failed = cudaSetDevice(where.device);
    return failed == cudaSuccess ? std::string() : cudaGetErrorString(failed);
}

// A box is `box_rows` rows of 128 bytes. What went wrong is left in `error`.
inline TensorMap make_map(const Operand3d& tensor, int box_rows, std::string& error) {
    TensorMap map{};
    const cuuint64_t sizes[] = {static_cast<cuuint64_t>(tensor.columns), static_cast<cuuint64_t>(tensor.rows),
                                static_cast<cuuint64_t>(tensor.experts)};
    const auto itemsize = static_cast<cuuint64_t>(tensor.itemsize());
    const cuuint64_t strides[] = {static_cast<cuuint64_t>(tensor.row_stride) * itemsize,
                                  static_cast<cuuint64_t>(tensor.expert_stride) * itemsize};
    const auto box_columns = static_cast<cuuint32_t>(swizzle_bytes / itemsize);
    const cuuint32_t box[] = {box_columns, static_cast<cuuint32_t>(box_rows), 1}, steps[] = {1, 1, 1};
    const auto encode = driver<EncodeTiled>("cuTensorMapEncodeTiled", error);
    if (encode == nullptr) return map;
    // Bits are copied: which type of this size it is does not matter.
    const auto type = tensor.is_float32 ? CU_TENSOR_MAP_DATA_TYPE_UINT32 : CU_TENSOR_MAP_DATA_TYPE_UINT16;
    const CUresult result =
        encode(&map, type, 3, const_cast<void*>(tensor.data), sizes, strides, box, steps,
               CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) error = "cuTensorMapEncodeTiled: error " + std::to_string(result);
    return map;
}

// kTogether: all CTAs run at once, or none.
template <bool kTogether, class... Parameters, class... Arguments>
std::string launch(void (*kernel)(Parameters...), int blocks, int threads, int bytes, const Where& where,
                   const Arguments&... arguments) {
    cudaLaunchAttribute attribute{};
    if (kTogether) {
        attribute.id = cudaLaunchAttributeCooperative;
        attribute.val.cooperative = 1;
    } else {
        // A grid may begin while the one before it ends: all kernels here wait for it by griddepcontrol_wait.
        attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attribute.val.programmaticStreamSerializationAllowed = where.overlaps;
    }
    cudaLaunchConfig_t config{};
    config.gridDim = static_cast<unsigned>(blocks);
    config.blockDim = static_cast<unsigned>(threads);
    config.dynamicSmemBytes = static_cast<size_t>(bytes);
    config.stream = static_cast<cudaStream_t>(where.stream);
    config.attrs = &attribute;
    config.numAttrs = 1;
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
    return error == cudaSuccess ? std::string() : cudaGetErrorString(error);
}

// Lets a kernel have as much shared memory as it needs, once on each device. `prepared`: on which it has been done.
template <class Kernel>
cudaError_t prepare(Kernel kernel, int bytes, std::atomic<uint64_t>& prepared, int device) {
    const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
    if ((prepared.load(std::memory_order_relaxed) & bit) != 0) return cudaSuccess;
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error == cudaSuccess) prepared.fetch_or(bit, std::memory_order_relaxed);
    return error;
}

template <class Shape, class Epilogue>
std::string launch_product(const Task<Epilogue>& task, const Where& where) {
    constexpr int bytes = Product<Shape, Epilogue>::shared_bytes;
    const auto kernel = product_kernel<Shape, Epilogue>;
    static std::atomic<uint64_t> prepared{0};
    const cudaError_t error = prepare(kernel, bytes, prepared, where.device);
    if (error != cudaSuccess) return cudaGetErrorString(error);
    const int clusters = std::min(task.work.tiles(), where.multiprocessors / 2);
    return launch<false>(kernel, 2 * clusters, num_threads, bytes, where, task);
}

template <class FirstShape, class FirstEpilogue, class SecondShape, class SecondEpilogue>
std::string launch_pair(const Task<FirstEpilogue>& first, const Task<SecondEpilogue>& second, const HandOver& hand_over,
                        const Where& where) {
    constexpr int bytes = Pair<FirstShape, FirstEpilogue, SecondShape, SecondEpilogue>::shared_bytes;
    const auto kernel = pair_kernel<FirstShape, FirstEpilogue, SecondShape, SecondEpilogue>;
    static std::atomic<uint64_t> prepared{0};
    cudaError_t error = prepare(kernel, bytes, prepared, where.device);
    // They wait for one another: no more than run at once.
    int most = 0;
    cudaLaunchConfig_t config{};
    config.gridDim = 2;
    config.blockDim = num_threads;
    config.dynamicSmemBytes = bytes;
    config.stream = static_cast<cudaStream_t>(where.stream);
    if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&most, kernel, &config);
    if (error != cudaSuccess) return cudaGetErrorString(error);
    const int clusters = std::min({most, where.multiprocessors / 2, std::max(first.work.tiles(), second.work.tiles())});
    return launch<true>(kernel, 2 * clusters, num_threads, bytes, where, first, second, hand_over);
}

// A kernel without clusters, and without shared memory of its own.
template <class... Parameters, class... Arguments>
std::string launch_simple(void (*kernel)(Parameters...), int blocks, int threads, const Where& where,
                          const Arguments&... arguments) {
    return launch<false>(kernel, blocks, threads, 0, where, arguments...);
}

}  // namespace ewa::hopper

#endif

namespace ewa::hopper {

inline std::string launch_sum(const float* parts, int64_t experts, int splits, int64_t size, const Output& out,
                              const Layer& layer) {
    const int64_t wanted = ceil_div(experts * size / 4, sum_threads), most = int64_t{8} * layer.where.multiprocessors;
    return launch_simple(sum_parts_kernel<sum_threads>, static_cast<int>(wanted < most ? wanted : most), sum_threads,
                         layer.where, parts, experts, splits, size, out.data, out.type);
}

}  // namespace ewa::hopper
