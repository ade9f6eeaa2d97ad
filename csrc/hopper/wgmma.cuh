// The matrix products of a warpgroup. Included by instructions.cuh.
#pragma once

namespace ewa::hopper {

// All aligned, and by the four warps of a warpgroup alike.

// Before the first product, and after any other use of the accumulators.
EWA_PTX void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
EWA_PTX void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most so many groups of products are under way.
template <int kGroups>
EWA_PTX void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}

// Keeps the compiler from moving uses of accumulators across this line: the wait does not name them.
template <int kRegisters>
EWA_PTX void pin(float (&d)[kRegisters]) {
#pragma unroll
    for (int i = 0; i < kRegisters; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Registers by their numbers in the asm statement, and what they are bound to: inline PTX has no other way.
#define EWA_TEN(t) "%" t "0,%" t "1,%" t "2,%" t "3,%" t "4,%" t "5,%" t "6,%" t "7,%" t "8,%" t "9,"
#define EWA_FIRST_TEN "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,"
#define EWA_REGISTERS_4 "%0,%1,%2,%3"
#define EWA_REGISTERS_32 EWA_FIRST_TEN EWA_TEN("1") EWA_TEN("2") "%30,%31"
#define EWA_REGISTERS_40 EWA_FIRST_TEN EWA_TEN("1") EWA_TEN("2") EWA_TEN("3")
#define EWA_REGISTERS_48 EWA_REGISTERS_40 "%40,%41,%42,%43,%44,%45,%46,%47"
#define EWA_REGISTERS_64 EWA_REGISTERS_40 EWA_TEN("4") EWA_TEN("5") "%60,%61,%62,%63"
#define EWA_REGISTERS_90 EWA_REGISTERS_40 EWA_TEN("4") EWA_TEN("5") EWA_TEN("6") EWA_TEN("7") EWA_TEN("8")
#define EWA_REGISTERS_96 EWA_REGISTERS_90 "%90,%91,%92,%93,%94,%95"
#define EWA_REGISTERS_128 \
    EWA_REGISTERS_90 EWA_TEN("9") EWA_TEN("10") EWA_TEN("11") "%120,%121,%122,%123,%124,%125,%126,%127"

#define EWA_BOUND_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define EWA_BOUND_16(i) EWA_BOUND_4(i), EWA_BOUND_4(i + 4), EWA_BOUND_4(i + 8), EWA_BOUND_4(i + 12)
#define EWA_BOUND_32(i) EWA_BOUND_16(i), EWA_BOUND_16(i + 16)
#define EWA_BOUND_48(i) EWA_BOUND_32(i), EWA_BOUND_16(i + 32)
#define EWA_BOUND_64(i) EWA_BOUND_32(i), EWA_BOUND_32(i + 32)
#define EWA_BOUND_96(i) EWA_BOUND_64(i), EWA_BOUND_32(i + 64)
#define EWA_BOUND_128(i) EWA_BOUND_64(i), EWA_BOUND_64(i + 64)

template <int kN, Operand kType, Major kMajorA, Major kMajorB>
struct Wgmma;

// N, half of it, and the numbers of the operands that follow the accumulators.
#define EWA_WGMMA(n, count, a, b, accumulate, transpose_a, transpose_b, type)                                       \
    template <Major kMajorA, Major kMajorB>                                                                         \
    struct Wgmma<n, Operand::type, kMajorA, kMajorB> {                                                              \
        EWA_PTX static void run(float (&d)[count], uint64_t descriptor_a, uint64_t descriptor_b, int keep) {        \
            asm volatile(                                                                                           \
                "{\n.reg .pred p;\nsetp.ne.b32 p, %" #accumulate ", 0;\n"                                           \
                "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." #type "." #type " {" EWA_REGISTERS_##count "}, %" \
                #a ", %" #b ", p, 1, 1, %" #transpose_a ", %" #transpose_b ";\n}"                                   \
                : EWA_BOUND_##count(0)                                                                              \
                : "l"(descriptor_a), "l"(descriptor_b), "r"(keep), "n"(kMajorA == Major::mn),                       \
                  "n"(kMajorB == Major::mn)                                                                         \
                : "memory");                                                                                        \
        }                                                                                                           \
    };
#define EWA_WGMMA_TYPES(...)     \
    EWA_WGMMA(__VA_ARGS__, bf16) \
    EWA_WGMMA(__VA_ARGS__, f16)

EWA_WGMMA_TYPES(8, 4, 4, 5, 6, 7, 8)
EWA_WGMMA_TYPES(64, 32, 32, 33, 34, 35, 36)
EWA_WGMMA_TYPES(96, 48, 48, 49, 50, 51, 52)
EWA_WGMMA_TYPES(128, 64, 64, 65, 66, 67, 68)
EWA_WGMMA_TYPES(192, 96, 96, 97, 98, 99, 100)
EWA_WGMMA_TYPES(256, 128, 128, 129, 130, 131, 132)

// d (+)= A [64 × 16] · B [16 × N], in float32. Lane l of warp w has in d[4 j + 2 h + i] the element of row
// 16 w + 8 h + l / 4 and column 8 j + 2 (l % 4) + i. What was in d is added if `accumulate`, else ignored.
template <int kN, Operand kType, Major kMajorA, Major kMajorB>
EWA_PTX void wgmma(float (&d)[kN / 2], uint64_t descriptor_a, uint64_t descriptor_b, bool accumulate) {
    Wgmma<kN, kType, kMajorA, kMajorB>::run(d, descriptor_a, descriptor_b, accumulate);
}

#undef EWA_WGMMA_TYPES
#undef EWA_WGMMA

}  // namespace ewa::hopper
