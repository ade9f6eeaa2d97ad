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

namespace ewa {

// But for bfloat16.
inline bool have_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

}  // namespace ewa
#endif
