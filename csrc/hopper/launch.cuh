// How the host describes tensors to TMA and launches a product.
#pragma once

#include <string>

#include "parts.cuh"
#include "product.cuh"

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

#include <atomic>

namespace ewa::hopper {

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's encoder, so that nothing is linked with the driver.
inline EncodeTiled encode_tiled() {
    static const EncodeTiled found = [] {
        void* entry = nullptr;
        cudaDriverEntryPointQueryResult result;
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &result);
        return reinterpret_cast<EncodeTiled>(result == cudaDriverEntryPointSuccess ? entry : nullptr);
    }();
    return found;
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
    const EncodeTiled encode = encode_tiled();
    if (encode == nullptr) {
        error = "the driver has no cuTensorMapEncodeTiled: it must be of CUDA 12.0 or later";
        return map;
    }
    // Bits are copied: which type of this size it is does not matter.
    const auto type = tensor.is_float32 ? CU_TENSOR_MAP_DATA_TYPE_UINT32 : CU_TENSOR_MAP_DATA_TYPE_UINT16;
    const CUresult result =
        encode(&map, type, 3, const_cast<void*>(tensor.data), sizes, strides, box, steps,
               CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) error = "cuTensorMapEncodeTiled: error " + std::to_string(result);
    return map;
}

template <class Shape, class Epilogue>
std::string launch_product(const Maps<Epilogue>& maps, const Work& work, const Gather& rows,
                           const typename Epilogue::Arguments& arguments, int multiprocessors, void* stream) {
    constexpr int bytes = Product<Shape, Epilogue>::shared_bytes;
    const auto kernel = product_kernel<Shape, Epilogue>;
    static std::atomic<uint64_t> prepared{0};  // devices on which the kernel may have so much shared memory
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    const uint64_t bit = uint64_t{1} << (device & 63);
    if (error == cudaSuccess && (prepared.load(std::memory_order_relaxed) & bit) == 0) {
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
        if (error == cudaSuccess) prepared.fetch_or(bit, std::memory_order_relaxed);
    }
    const int clusters = work.tiles() < multiprocessors / 2 ? work.tiles() : multiprocessors / 2;
    if (error == cudaSuccess) {
        kernel<<<2 * clusters, num_threads, bytes, static_cast<cudaStream_t>(stream)>>>(maps, work, rows, arguments);
        error = cudaGetLastError();
    }
    return error == cudaSuccess ? std::string() : cudaGetErrorString(error);
}

inline std::string launch_sum(const float* parts, int64_t experts, int splits, int64_t size, void* out, int type,
                              int multiprocessors, void* stream) {
    const int64_t wanted = (experts * size + sum_threads - 1) / sum_threads, most = int64_t{8} * multiprocessors;
    const auto blocks = static_cast<unsigned>(wanted < most ? wanted : most);
    sum_parts_kernel<<<blocks, sum_threads, 0, static_cast<cudaStream_t>(stream)>>>(parts, experts, splits, size, out,
                                                                                   type);
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? std::string() : cudaGetErrorString(error);
}

}  // namespace ewa::hopper

#endif
