// Every name of csrc/hopper/instructions.cuh, and the small GEMM, for nvcc to compile; not to be run.
#include "gemm.h"

namespace {

using namespace ewa::hopper;

template <int kN, Operand kType, Major kA, Major kB>
__device__ void product(float* out, uint32_t a, uint32_t b, bool accumulate) {
    float d[kN / 2];
    wgmma_fence();
    wgmma<kN, kType, kA, kB>(d, make_descriptor<kA>(a), make_descriptor<kB>(b), false);
    wgmma<kN, kType, kA, kB>(d, make_descriptor<kA>(a) + descriptor_next_k16<kA>,
                             make_descriptor<kB>(b) + descriptor_next_k16<kB>, accumulate);
    wgmma_commit();
    wgmma_wait<0>();
    pin(d);
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) store_global_f32(out + thread_id() * kN / 2 + i, d[i]);
}

template <int kN>
__global__ void __launch_bounds__(128, 1) products(float* out, bool accumulate) {
    const uint32_t a = shared_memory(), b = a + 2 * atom_bytes;
    product<kN, Operand::bf16, Major::k, Major::k>(out, a, b, accumulate);
    product<kN, Operand::f16, Major::k, Major::mn>(out, a, b, accumulate);
    product<kN, Operand::bf16, Major::mn, Major::mn>(out, a, b, accumulate);
    product<kN, Operand::f16, Major::mn, Major::k>(out, a, b, accumulate);
}

template __global__ void products<8>(float*, bool);
template __global__ void products<64>(float*, bool);
template __global__ void products<96>(float*, bool);
template __global__ void products<128>(float*, bool);
template __global__ void products<192>(float*, bool);
template __global__ void products<256>(float*, bool);

}  // namespace

__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)
    everything(const __grid_constant__ TensorMap map, uint32_t* flag, float* out, const int* in) {
    const uint32_t s = shared_memory(), barrier = s + 65536;
    if (thread_id() == 0) {
        mbarrier_init(barrier, 2);
        fence_mbarrier_init();
        prefetch_tensor_map(&map);
    }
    cluster_sync();
    griddepcontrol_wait();
    griddepcontrol_launch_dependents();
    if (warp_uniform(thread_id() / 128) == 0)
        setmaxnreg_dec<40>();
    else
        setmaxnreg_inc<232>();
    if (elect_one()) {
        mbarrier_arrive_expect_tx(barrier, 100);
        mbarrier_arrive(barrier);
        mbarrier_arrive_cluster(barrier, cluster_rank() ^ 1);
        tma_load_2d(s, &map, barrier, 1, 2);
        tma_load_3d(s, &map, barrier, 1, 2, 3);
        tma_load_multicast_2d(s, &map, barrier, 1, 2, 3);
        tma_load_multicast_3d(s, &map, barrier, 1, 2, 3, 3);
        tma_store_2d(&map, s, 1, 2);
        tma_store_3d(&map, s, 1, 2, 3);
        tma_store_commit();
        tma_store_wait_read<1>();
        tma_store_wait<0>();
        fence_proxy_async_global();
        add_release(flag, 1);
        while (load_acquire(flag) < cluster_id() + num_clusters()) continue;
        fence_gpu();
    }
    warp_sync();
    mbarrier_wait(barrier, 0);
    if (mbarrier_try_wait(barrier, 1)) cp_async_16(s, flag);
    cp_async_16(s, flag, 8);
    cp_async_commit();
    cp_async_wait<1>();
    cp_async_mbarrier_arrive(barrier);
    fence_proxy_async_shared();
    named_barrier_sync(1, 256);
    named_barrier_arrive(2, 256);
    uint32_t r[4], t[4];
    ldmatrix_x4(s, r);
    ldmatrix_x4_transposed(s, t);
    stmatrix_x4(s, r[0], r[1], t[0], t[1]);
    store_shared_u32(s, r[2] + load_shared_u32(s + 8));
    store_shared_f32(s, load_shared_f32(s + 8));
    store_shared_u32x4(s, load_shared_u32x4(s + 16));
    float2 v = load_shared_f32x2(s);
    store_global_u32x4(out, load_global_u32x4(out + 4));
    store_global_f32(out, exp2_approx(v.x) + load_constant_f32(out) + load_global_i32(in) +
                              load_constant_u64(in));
    v.x += shuffle(v.y, 3) + shuffle_xor(v.x, 1);
    v = unpack<Operand::f16>(pack<Operand::bf16>(v.x, v.y) ^ pack<Operand::f16>(v.x, v.y));
    store_global_f32(out + 1, v.x + unpack<Operand::bf16>(multiply_high(r[0], t[0])).y);
}

#define MAP const __grid_constant__ TensorMap
template __global__ void programs::gemm<Major::k>(MAP, MAP, MAP, int, int, int);
template __global__ void programs::gemm<Major::mn>(MAP, MAP, MAP, int, int, int);
