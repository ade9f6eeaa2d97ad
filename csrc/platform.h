// Words that compilers spell differently.
#pragma once

#define EWA_INLINE static inline __attribute__((always_inline))

#ifdef __CUDACC__
#define EWA_ANYWHERE __host__ __device__ __forceinline__
#else
#define EWA_ANYWHERE inline __attribute__((always_inline))
#endif

// One build for every x86 processor: the widest vectors it has are chosen when the module is loaded.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define EWA_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EWA_CLONES
#endif

// Functions for AVX-512, which are only called where the processor has it, and what they use of bfloat16 only where it
// has that too. Older compilers do not know all of it.
#if defined(__x86_64__) && (defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 10))
#define EWA_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")))
#endif
