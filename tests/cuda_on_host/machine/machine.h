// A model of sm_90a on the host: the names of csrc/hopper/instructions.cuh, which includes this file where the
// compiler is not nvcc. Threads are fibres, shared memory is bytes, and what is asynchronous happens as late as it may,
// at once or at random; `launch` (launch.h) runs a grid and returns what was wrong, or an empty string.
//
// What it does not cover:
// - Plain accesses through pointers: only load_… and store_… are seen.
// - Races within a warp. Between warps, accesses to shared memory without a barrier between are an error if one of them
//   writes, be it by threads, a TMA load, a TMA store or wgmma, which read until they are waited for; in global memory
//   only a thread's read of what another wrote is. Generic writes are seen by all at once. fence_gpu is not asked for.
// - Where the fence between the proxies stands: it may be on the writer's side or the reader's. It is not asked for
//   between the end of a TMA store and the release of a flag.
// - Registers: reads of accumulators in flight show as NaN; a missing wgmma_fence is seen as "none since the last wait"
//   for accumulators that are not in flight. Spills, bank conflicts and time do not exist.
// - Convergence is seen where lanes are in different aligned instructions, or have ended; lanes at the same instruction
//   in two places of a program are taken for converged.
// - Descriptors of other swizzles than 128 bytes, boxes narrower than the swizzle, A from registers, clusters of more
//   than two, the L2 and its hints. Launches come one after the other: of a grid that is
//   dependent each thread must have called griddepcontrol_wait before it uses global memory.
// - A loop that polls a flag some times and then goes on by itself may be taken for a livelock.
#pragma once

#define __device__
#define __host__
#define __global__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __cluster_dims__(...)

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>

struct float2 {
    float x, y;
};
struct uint4 {
    uint32_t x, y, z, w;
};

#include "barriers.h"
#include "copies.h"
#include "launch.h"
#include "memory.h"
#include "products.h"
#include "tensor_maps.h"
#include "warps.h"
