// Sums of parts, always in the same order.
#pragma once

#include "epilogues.cuh"

namespace ewa::hopper {

constexpr int sum_threads = 256;

// out [experts, size] = the sum of parts [experts, splits, size] over splits, in the type that is asked for.
// Grid: any number of CTAs.
static __global__ void __launch_bounds__(sum_threads)
    sum_parts_kernel(const float* parts, int64_t experts, int splits, int64_t size, void* out, int type) {
    const int64_t stride = static_cast<int64_t>(num_clusters()) * sum_threads;
    for (int64_t i = static_cast<int64_t>(cluster_id()) * sum_threads + thread_id(); i < experts * size; i += stride) {
        const int64_t expert = i / size;
        const float* part = parts + expert * splits * size + (i - expert * size);
        float sum = load_global_f32(part);
        for (int split = 1; split < splits; ++split) sum += load_global_f32(part + split * size);
        if (type == Vector::float32) {
            store_global_f32(static_cast<float*>(out) + i, sum);
        } else {
            const bool is_bfloat16 = type == Vector::bfloat16;
            const uint32_t bits = is_bfloat16 ? pack<Operand::bf16>(sum, 0.0f) : pack<Operand::f16>(sum, 0.0f);
            store_global_u16(static_cast<uint16_t*>(out) + i, bits & 0xFFFFu);
        }
    }
}

}  // namespace ewa::hopper
