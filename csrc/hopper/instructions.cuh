// The instructions of sm_90a that kernels here are written with, each once, behind a plain name.
//
// Kernels are written on these names alone, and so their source also compiles for a model of the machine on the host:
// whoever is not nvcc gets `machine.h`, from tests/cuda_on_host/machine (-I), where the same names are. Addresses in
// shared memory are uint32_t, relative to the CTA's own window. "aligned" means: by all lanes of a warp together.
#pragma once

#include "descriptors.h"

#ifndef __CUDACC__
#include "machine.h"
#else

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

extern __shared__ uint8_t ewa_hopper_shared[];

namespace ewa::hopper {

using TensorMap = CUtensorMap;

#define EWA_PTX __device__ __forceinline__

// --- who we are ---

EWA_PTX int thread_id() { return static_cast<int>(threadIdx.x); }

EWA_PTX uint32_t cluster_rank() {  // of this CTA in its cluster
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
EWA_PTX uint32_t cluster_id() {
    uint32_t id;
    asm volatile("mov.u32 %0, %%clusterid.x;" : "=r"(id));
    return id;
}
EWA_PTX uint32_t num_clusters() {
    uint32_t number;
    asm volatile("mov.u32 %0, %%nclusterid.x;" : "=r"(number));
    return number;
}

// Dynamic shared memory, from the first multiple of 1,024 bytes on: 1,023 bytes more than needed must be asked for.
EWA_PTX uint32_t shared_memory() {
    return (static_cast<uint32_t>(__cvta_generic_to_shared(ewa_hopper_shared)) + 1023u) & ~1023u;
}

// --- warps ---

// Lane 0's value, which the compiler then knows to be the same in all lanes. Aligned.
EWA_PTX int warp_uniform(int value) { return __shfl_sync(~0u, value, 0); }

template <class T>
EWA_PTX T shuffle(T value, int lane) {
    return __shfl_sync(~0u, value, lane);
}
template <class T>
EWA_PTX T shuffle_xor(T value, int mask) {
    return __shfl_xor_sync(~0u, value, mask);
}

// True in one lane, the same one each time. Aligned. The compiler knows, as it does not of a comparison with a lane,
// that one thread goes on.
EWA_PTX bool elect_one() {
    uint32_t elected;
    asm volatile(
        "{\n.reg .pred p;\n"
        "elect.sync _|p, 0xFFFFFFFF;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(elected));
    return elected != 0;
}

EWA_PTX void warp_sync() { __syncwarp(); }

// Registers of a thread from here on; by all warps of a warpgroup. Aligned.
template <int kRegisters>
EWA_PTX void setmaxnreg_inc() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
EWA_PTX void setmaxnreg_dec() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// --- barriers ---

EWA_PTX void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// By the thread that initialised, before the barrier that lets others, the peer and TMA use it.
EWA_PTX void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

EWA_PTX void mbarrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives and lets the phase wait for so many bytes more.
EWA_PTX void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// On the barrier at the same address of a CTA of the cluster, which may be our own. Not `.release.cluster` in so many
// words: ptxas then puts a MEMBAR.ALL.GPU before it. So it orders nothing for the peer but what wgmma has read.
EWA_PTX void mbarrier_arrive_cluster(uint32_t barrier, uint32_t rank) {
    asm volatile(
        "{\n.reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier),
        "r"(rank)
        : "memory");
}
EWA_PTX bool mbarrier_try_wait(uint32_t barrier, uint32_t parity) {
    uint32_t done;
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
    return done != 0;
}
// Until the phase of this parity is over. On a fresh barrier, phase 0 is under way and that of parity 1 is over.
// With EWA_HOPPER_DEBUG, who waits for seconds ends the kernel; a debugger shows where. A printf would be a call, and
// ptxas would then have products wait for one another.
EWA_PTX void mbarrier_wait(uint32_t barrier, uint32_t parity) {
#ifdef EWA_HOPPER_DEBUG
    const long long begin = clock64();
    while (!mbarrier_try_wait(barrier, parity))
        if (clock64() - begin > 4000000000ll) __trap();
#else
    asm volatile(
        "{\n.reg .pred p;\n"
        "WAIT_%=:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
        "@p bra DONE_%=;\n"
        "bra WAIT_%=;\n"
        "DONE_%=:\n}" ::"r"(barrier),
        "r"(parity)
        : "memory");
#endif
}

// Both aligned.
EWA_PTX void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
EWA_PTX void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
EWA_PTX void cluster_sync() {
    cluster_arrive();
    cluster_wait();
}

// Barrier 0 … 15 of the CTA (0 is __syncthreads), for a number of threads that is a multiple of 32. Aligned.
EWA_PTX void named_barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
EWA_PTX void named_barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// --- fences, and flags in global memory ---

// Between what threads write to shared memory and what TMA or wgmma reads there.
EWA_PTX void fence_proxy_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// The same for global memory; also between what a TMA store has written and what others read.
EWA_PTX void fence_proxy_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }
EWA_PTX void fence_gpu() { __threadfence(); }

EWA_PTX uint32_t load_acquire(const uint32_t* flag) {
    uint32_t value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
    return value;
}
EWA_PTX void add_release(uint32_t* flag, uint32_t value) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

// What was there before; in no order with anything else.
EWA_PTX uint32_t fetch_add(uint32_t* flag, uint32_t value) {
    uint32_t before;
    asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(flag), "r"(value) : "memory");
    return before;
}
// Of a thread that waits for a flag.
EWA_PTX void back_off() { __nanosleep(64); }

// Until the kernels before this one are done and what they wrote is visible; lets the next one start.
EWA_PTX void griddepcontrol_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
EWA_PTX void griddepcontrol_launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// --- TMA, by one thread; x is the innermost coordinate ---

EWA_PTX void prefetch_tensor_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

#define EWA_TMA_LOAD "shared::cluster.global.tile.mbarrier::complete_tx::bytes"

EWA_PTX void tma_load_2d(uint32_t to, const TensorMap* map, uint32_t barrier, int x, int y) {
    asm volatile("cp.async.bulk.tensor.2d." EWA_TMA_LOAD " [%0], [%1, {%3, %4}], [%2];" ::"r"(to), "l"(map),
                 "r"(barrier), "r"(x), "r"(y)
                 : "memory");
}
EWA_PTX void tma_load_3d(uint32_t to, const TensorMap* map, uint32_t barrier, int x, int y, int z) {
    asm volatile("cp.async.bulk.tensor.3d." EWA_TMA_LOAD " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to), "l"(map),
                 "r"(barrier), "r"(x), "r"(y), "r"(z)
                 : "memory");
}
// To the same address of every CTA of the cluster in the mask, where the same barrier gets the whole box's bytes.
EWA_PTX void tma_load_multicast_2d(uint32_t to, const TensorMap* map, uint32_t barrier, int x, int y, uint16_t mask) {
    asm volatile(
        "cp.async.bulk.tensor.2d." EWA_TMA_LOAD ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
        "l"(map), "r"(barrier), "r"(x), "r"(y), "h"(mask)
        : "memory");
}
EWA_PTX void tma_load_multicast_3d(uint32_t to, const TensorMap* map, uint32_t barrier, int x, int y, int z,
                                   uint16_t mask) {
    asm volatile(
        "cp.async.bulk.tensor.3d." EWA_TMA_LOAD ".multicast::cluster [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(to),
        "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z), "h"(mask)
        : "memory");
}

EWA_PTX void tma_store_2d(const TensorMap* map, uint32_t from, int x, int y) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
                 "r"(from), "r"(x), "r"(y)
                 : "memory");
}
EWA_PTX void tma_store_3d(const TensorMap* map, uint32_t from, int x, int y, int z) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
                 "r"(from), "r"(x), "r"(y), "r"(z)
                 : "memory");
}
EWA_PTX void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until of this thread's groups at most so many have not yet read shared memory, or are not yet in global memory.
template <int kGroups>
EWA_PTX void tma_store_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kGroups) : "memory");
}
template <int kGroups>
EWA_PTX void tma_store_wait() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kGroups) : "memory");
}

// --- cp.async, by each thread for itself ---

EWA_PTX void cp_async_16(uint32_t to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
// Reads `bytes` (0 … 16), the rest becomes zeros.
EWA_PTX void cp_async_16(uint32_t to, const void* from, uint32_t bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
EWA_PTX void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroups>
EWA_PTX void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}
// An arrival, counted at initialisation, when all that this thread has copied so far has landed.
EWA_PTX void cp_async_mbarrier_arrive(uint32_t barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// --- shared and global memory ---

EWA_PTX uint32_t load_shared_u32(uint32_t at) {
    uint32_t v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at) : "memory");
    return v;
}
EWA_PTX float load_shared_f32(uint32_t at) {
    float v;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(at) : "memory");
    return v;
}
EWA_PTX float2 load_shared_f32x2(uint32_t at) {
    float2 v;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(at) : "memory");
    return v;
}
EWA_PTX uint4 load_shared_u32x4(uint32_t at) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(at)
                 : "memory");
    return v;
}
EWA_PTX void store_shared_u32(uint32_t at, uint32_t v) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(v) : "memory");
}
EWA_PTX void store_shared_f32(uint32_t at, float v) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(v) : "memory");
}
EWA_PTX void store_shared_f32x2(uint32_t at, float2 v) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(at), "f"(v.x), "f"(v.y) : "memory");
}
EWA_PTX void store_shared_u32x4(uint32_t at, uint4 v) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

// What nobody writes while the kernel runs, be it before griddepcontrol_wait: parameters and seeds, never what another
// kernel here has made.
EWA_PTX uint64_t load_constant_u64(const void* at) {
    uint64_t v;
    asm volatile("ld.global.nc.u64 %0, [%1];" : "=l"(v) : "l"(at));  // volatile: not before a wait for other grids
    return v;
}
EWA_PTX float load_constant_f32(const float* at) {
    float v;
    asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(v) : "l"(at));
    return v;
}
EWA_PTX uint32_t load_constant_u16(const uint16_t* at) {
    uint16_t v;
    asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(v) : "l"(at));
    return v;
}
EWA_PTX int load_global_i32(const int* at) {
    int v;
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(v) : "l"(at));
    return v;
}
EWA_PTX void load_global_f32x4(const float* at, float (&v)[4]) {
    asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
                 : "l"(at));  // no "memory": several may be under way
}
EWA_PTX uint4 load_global_u32x4(const void* at) {
    uint4 v;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(at)
                 : "memory");
    return v;
}
EWA_PTX void store_global_i32(int* at, int v) { asm volatile("st.global.u32 [%0], %1;" ::"l"(at), "r"(v) : "memory"); }
EWA_PTX void store_global_u32(uint32_t* at, uint32_t v) {
    asm volatile("st.global.u32 [%0], %1;" ::"l"(at), "r"(v) : "memory");
}
EWA_PTX void store_global_f32(float* at, float v) {
    asm volatile("st.global.f32 [%0], %1;" ::"l"(at), "f"(v) : "memory");
}
EWA_PTX void store_global_u32x4(void* at, uint4 v) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

// Four matrices of 8 × 8 16-bit elements. Lane l gives the address of row l % 8 of matrix l / 8, and has of matrix i in
// r[i] the elements 2 (l % 4) and the next of row l / 4; transposed, of that column. Aligned.
#define EWA_MATRICES "sync.aligned.m8n8.x4"

EWA_PTX void stmatrix_x4(uint32_t row, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
    asm volatile("stmatrix." EWA_MATRICES ".shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(r0), "r"(r1), "r"(r2),
                 "r"(r3)
                 : "memory");
}
EWA_PTX void ldmatrix_x4(uint32_t row, uint32_t (&r)[4]) {
    asm volatile("ldmatrix." EWA_MATRICES ".shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}
EWA_PTX void ldmatrix_x4_transposed(uint32_t row, uint32_t (&r)[4]) {
    asm volatile("ldmatrix." EWA_MATRICES ".trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}

// --- arithmetic ---

EWA_PTX float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
EWA_PTX float reciprocal_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// The larger one; a NaN if one of them is.
EWA_PTX float max_nan(float a, float b) {
    float c;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
    return c;
}
EWA_PTX uint32_t multiply_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }

// Two numbers in the halves of 32 bits, rounded to nearest even.
template <Operand kType>
EWA_PTX uint32_t pack(float low, float high) {
    uint32_t pair;
    if constexpr (kType == Operand::bf16)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    else
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
template <Operand kType>
EWA_PTX float2 unpack(uint32_t pair) {
    if constexpr (kType == Operand::bf16) return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u)};
    return {__half2float(__ushort_as_half(static_cast<unsigned short>(pair))),
            __half2float(__ushort_as_half(static_cast<unsigned short>(pair >> 16)))};
}

#undef EWA_TMA_LOAD
#undef EWA_MATRICES

}  // namespace ewa::hopper

#include "wgmma.cuh"

#endif
