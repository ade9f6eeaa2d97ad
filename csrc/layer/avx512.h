// The intrinsics of AVX-512, and whether the processor has it. Not for nvcc.
#pragma once

#include "platform.h"

#ifdef EWA_AVX512
#if defined(__GNUC__) && !defined(__clang__)
// Of GCC's own header, whose functions leave a register undefined on purpose.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include <algorithm>
#include <cstdint>

namespace ewa {

// But for bfloat16.
inline bool have_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

constexpr int64_t lanes = 16;  // of 32 bits

EWA_AVX512 EWA_INLINE __mmask16 first_lanes(int64_t n) {
    return n >= lanes ? 0xFFFF : static_cast<__mmask16>((1u << std::max<int64_t>(n, 0)) - 1);
}

}  // namespace ewa
#endif
