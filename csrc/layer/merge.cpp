#include "merge.h"

#include <algorithm>

namespace ewa {
namespace {

constexpr int64_t chunk = 1024;  // whose sums stay in the first cache

template <class T>
void merge(const T* experts, int64_t num_experts, int64_t numel, T* out) {
#pragma omp parallel for schedule(static) if (numel > 32 * chunk)
    for (int64_t first = 0; first < numel; first += chunk) {
        const int64_t n = std::min(chunk, numel - first);
        double sum[chunk];
        for (int64_t e = 0; e < num_experts; ++e) {
            const T* from = experts + e * numel + first;
            for (int64_t i = 0; i < n; ++i) sum[i] = e == 0 ? widen(from[i]) : sum[i] + widen(from[i]);
        }
        for (int64_t i = 0; i < n; ++i) out[first + i] = nearest<T>(static_cast<Wide<T>>(sum[i] / num_experts));
    }
}

}  // namespace

void merge_experts(const void* experts, int64_t num_experts, int64_t numel, Type type, void* out) {
    const auto by = [&](auto* to) { merge(static_cast<decltype(to)>(const_cast<void*>(experts)), num_experts, numel, to); };
    switch (type) {
        case Type::float32: return by(static_cast<float*>(out));
        case Type::float64: return by(static_cast<double*>(out));
        case Type::float16: return by(static_cast<Half*>(out));
        case Type::bfloat16: return by(static_cast<BFloat16*>(out));
    }
}

}  // namespace ewa
