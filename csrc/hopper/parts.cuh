// Sums of parts, always in the same order.
#pragma once

#include "epilogues.cuh"

namespace ewa::hopper {

constexpr int sum_threads = 256;

// Four elements from `at` on, which 4 divides.
__device__ __forceinline__ void store(void* out, int type, int64_t at, const float (&v)[4]) {
    if (type == float32) {
#pragma unroll
        for (int j = 0; j < 4; ++j) store_global_f32(static_cast<float*>(out) + at + j, v[j]);
        return;
    }
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
        const bool is_bfloat16 = type == bfloat16;
        const uint32_t pair = is_bfloat16 ? pack<Operand::bf16>(v[j], v[j + 1]) : pack<Operand::f16>(v[j], v[j + 1]);
        store_global_u32(reinterpret_cast<uint32_t*>(out) + (at + j) / 2, pair);
    }
}

// out [experts, size] = the sum of parts [experts, splits, size] over splits, in the type that is asked for; 4 divides
// size. A cluster is a CTA here.
// Grid: any number of CTAs.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    sum_parts_kernel(const float* parts, int64_t experts, int splits, int64_t size, void* out, int type) {
    griddepcontrol_wait();
    griddepcontrol_launch_dependents();
    const int64_t stride = static_cast<int64_t>(num_clusters()) * kThreads, quads = size / 4;
    for (int64_t i = static_cast<int64_t>(cluster_id()) * kThreads + thread_id(); i < experts * quads; i += stride) {
        const int64_t expert = i / quads;
        const float* part = parts + (expert * splits * quads + (i - expert * quads)) * 4;
        float sum[4] = {};
        // Some loads under way at a time.
#pragma unroll 4
        for (int split = 0; split < splits; ++split) {
            float v[4];
            load_global_f32x4(part + split * size, v);
#pragma unroll
            for (int j = 0; j < 4; ++j) sum[j] += v[j];
        }
        store(out, type, 4 * i, sum);
    }
}

}  // namespace ewa::hopper
