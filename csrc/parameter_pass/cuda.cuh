// The kernel of `parameter_pass_cuda`, and the table that it reads.
#pragma once

#include <cuda_runtime.h>

#include "elements.h"
#include "parameter_pass.h"
#include "random.h"

// In a pass: the coefficients of AdamW for each expert, then what is staged.
extern __shared__ uint4 shared[];

namespace ewa {
namespace {

constexpr int vector_bytes = 16;
constexpr int max_threads = 256;
constexpr int tile_bytes = 4 * max_threads * vector_bytes;  // of each expert, for one block

// The table as the kernel sees it: groups, then members (or only the addresses of parameters), then options. It
// travels in a launch's own parameters, so that nothing is cached which could be stale: in those of the pass, or if it
// is too large for them, to memory in those of `write_table`.
struct CudaGroup {
    int64_t numel;
    int64_t first_tile;
    int32_t first_member;
    int32_t num_experts;
    int32_t number;
    int16_t type;
    int8_t aligned;  // whether all tensors are, from `head` on
    int8_t head;     // how many elements come before the first vector
};

// The limit for all parameters is 4 KB before CUDA 12.1, and 32,764 bytes since.
template <bool kStep>
constexpr int table_bytes = CUDART_VERSION < 12010 ? 3584 : kStep ? 31744 : 7680;

template <bool kStep>
struct Parameters {
    alignas(16) char table[table_bytes<kStep>];
    const char* in_memory;  // the table, where it is too large for the parameters; or null
    Scalars scalars;
    uint32_t* counter;
    int32_t num_groups, num_members;
    int32_t adam_vectors;  // shared memory before what is staged, in vectors
    int32_t staged;        // how many experts there is shared memory for, if registers do not hold them
};

constexpr int chunk_bytes = table_bytes<true>;

struct Chunk {
    alignas(16) char bytes[chunk_bytes];  // of a table
    uint4* to;
    int32_t vectors;
};

// Grid: any.
__global__ void write_table(const __grid_constant__ Chunk chunk) {
    const auto* from = reinterpret_cast<const uint4*>(chunk.bytes);
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < chunk.vectors; i += gridDim.x * blockDim.x)
        chunk.to[i] = from[i];
}

template <bool kStep>
struct View {
    const CudaGroup* groups;
    const Member* members;
    void* const* params;
    const Options* options;

    __device__ explicit View(const Parameters<kStep>& p) {
        groups = reinterpret_cast<const CudaGroup*>(p.in_memory == nullptr ? p.table : p.in_memory);
        members = reinterpret_cast<const Member*>(groups + p.num_groups);
        params = reinterpret_cast<void* const*>(groups + p.num_groups);
        options = reinterpret_cast<const Options*>(members + p.num_members);
    }
    __device__ void* param(int member) const {
        if constexpr (kStep) return members[member].param;
        return params[member];
    }
};

template <class T, int kWidth>
struct alignas(sizeof(T) * kWidth) Vector {
    T lanes[kWidth];
};

// Streaming accesses: nothing is needed twice.
template <class T, int kWidth>
__device__ Vector<T, kWidth> load(const void* base, int64_t k) {
    using V = Vector<T, kWidth>;
    const T* at = static_cast<const T*>(base) + k;
    if constexpr (sizeof(V) == vector_bytes) return bit_cast<V>(__ldcs(reinterpret_cast<const uint4*>(at)));
    return *reinterpret_cast<const V*>(at);
}

template <class T, int kWidth>
__device__ void store(void* base, int64_t k, const Vector<T, kWidth>& v) {
    T* at = static_cast<T*>(base) + k;
    if constexpr (sizeof(v) == vector_bytes)
        __stcs(reinterpret_cast<uint4*>(at), bit_cast<uint4>(v));
    else
        *reinterpret_cast<Vector<T, kWidth>*>(at) = v;
}

template <class V>
__device__ bool aligned(const void* at) {
    return reinterpret_cast<uintptr_t>(at) % sizeof(V) == 0;
}

// The same, by elements where the tensor is not aligned: as all vectors of a tensor are alike, threads do not diverge.
template <class T, int kWidth>
__device__ Vector<T, kWidth> load_anywhere(const void* base, int64_t k) {
    const T* at = static_cast<const T*>(base) + k;
    if (aligned<Vector<T, kWidth>>(at)) return load<T, kWidth>(base, k);
    Vector<T, kWidth> v;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) v.lanes[j] = at[j];
    return v;
}

template <class T, int kWidth>
__device__ void store_anywhere(void* base, int64_t k, const Vector<T, kWidth>& v) {
    T* at = static_cast<T*>(base) + k;
    if (aligned<Vector<T, kWidth>>(at)) return store<T, kWidth>(base, k, v);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) at[j] = v.lanes[j];
}

__device__ double read(double value, const void* at, bool is_double) {
    if (at == nullptr) return value;
    return is_double ? *static_cast<const double*>(at) : *static_cast<const float*>(at);
}

// What all threads of a block know.
template <bool kStep>
struct Tile {
    const Parameters<kStep>& p;
    View<kStep> view;
    const CudaGroup& group;  // a copy of it all would take registers that the kernel lacks
    double share_rate;
    float grad_scale;
    RandomKeys keys;
};

// The AdamW step of one member's columns; returns the parameter.
template <class T, int kWidth, bool kAligned>
__device__ Vector<T, kWidth> adam_step(const Member& member, const Adam<Wide<T>>& adam, bool unscale, int64_t k,
                                       Vector<T, kWidth> param) {
    using W = Wide<T>;
    constexpr auto load = kAligned ? ewa::load<T, kWidth> : load_anywhere<T, kWidth>;
    constexpr auto store = kAligned ? ewa::store<T, kWidth> : store_anywhere<T, kWidth>;
    Vector<T, kWidth> grad = load(member.grad, k);
    Vector<T, kWidth> exp_avg = load(member.exp_avg, k);
    Vector<T, kWidth> exp_avg_sq = load(member.exp_avg_sq, k);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
        W g = widen(grad.lanes[j]), m = widen(exp_avg.lanes[j]), v = widen(exp_avg_sq.lanes[j]);
        param.lanes[j] = nearest<T>(adam(widen(param.lanes[j]), g, m, v));
        grad.lanes[j] = nearest<T>(g);
        exp_avg.lanes[j] = nearest<T>(m);
        exp_avg_sq.lanes[j] = nearest<T>(v);
    }
    store(member.exp_avg, k, exp_avg);
    store(member.exp_avg_sq, k, exp_avg_sq);
    if (unscale) store(member.grad, k, grad);
    return param;
}

// kWidth columns (elements of every expert) from k on. kHeld experts fit in registers; if kHeld is 0, they are kept
// in shared memory, where each thread has its own, and those there is no room for are read again. If not kAligned, some
// tensors may not be.
template <class T, int kWidth, int kHeld, bool kAligned, bool kStep>
__device__ void columns(const Tile<kStep>& tile, int64_t k) {
    using W = Wide<T>;
    using V = Vector<T, kWidth>;
    constexpr auto load = kAligned ? ewa::load<T, kWidth> : load_anywhere<T, kWidth>;
    constexpr auto store = kAligned ? ewa::store<T, kWidth> : store_anywhere<T, kWidth>;
    const int num_experts = tile.group.num_experts, first_member = tile.group.first_member;
    const bool averaging = num_experts > 1 && tile.share_rate != 0;
    const auto* adams = reinterpret_cast<const Adam<W>*>(shared);
    V registers[kHeld > 0 ? kHeld : 1];
    const auto staged = [&](int e) -> V& {
        return *reinterpret_cast<V*>(shared + tile.p.adam_vectors + e * blockDim.x + threadIdx.x);
    };
    const auto param = [&](int e) { return tile.view.param(first_member + e); };
    const auto for_each_expert = [&](const auto& body) {
        if constexpr (kHeld > 0) {
#pragma unroll
            for (int e = 0; e < kHeld; ++e)
                if (e < num_experts) body(e);
        } else {
#pragma unroll 4
            for (int e = 0; e < num_experts; ++e) body(e);
        }
    };

    V first;
    W mean[kWidth] = {};
    for_each_expert([&](int e) {
        V v = load(param(e), k);
        if constexpr (kStep) {
            const Member& member = tile.view.members[first_member + e];
            if (member.grad != nullptr)
                v = adam_step<T, kWidth, kAligned>(member, adams[e], tile.grad_scale != 1.0f, k, v);
        }
        if constexpr (kHeld > 0)
            registers[e] = v;
        else if (e < tile.p.staged)
            staged(e) = v;
        else if constexpr (kStep)
            store(param(e), k, v);
        if (e == 0) first = v;
        // The mean of distances from the first expert: equal experts have exactly their value for a mean.
#pragma unroll
        for (int j = 0; j < kWidth; ++j) mean[j] += widen(v.lanes[j]) - widen(first.lanes[j]);
    });
    const W share = W(1) / static_cast<W>(num_experts);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) mean[j] = widen(first.lanes[j]) + mean[j] * share;

    const Pull<W> pull = Pull<W>::of(tile.share_rate, num_experts);
    const bool stochastically = sizeof(T) == 2 && tile.p.scalars.stochastic;
    for_each_expert([&](int e) {
        V v;
        if constexpr (kHeld > 0)
            v = registers[e];
        else
            v = e < tile.p.staged ? staged(e) : load(param(e), k);
        if (averaging) {
            const uint32_t of_expert = tile.keys.of_expert(tile.group.number + e);
#pragma unroll
            for (int j = 0; j < kWidth; ++j) {
                const W pulled = pull(widen(v.lanes[j]), mean[j]);
                // Vectors start at even elements, and so lanes 2i and 2i + 1 share a hash, which is computed once.
                const int64_t element = kWidth > 1 ? k + (j & ~1) : k;
                const int64_t parity = kWidth > 1 ? j : k;
                v.lanes[j] = stochastically
                                 ? stochastic<T>(pulled, random_bits(of_expert, tile.keys.of_element(element), parity))
                                 : nearest<T>(pulled);
            }
        }
        store(param(e), k, v);
        if constexpr (kStep && sizeof(T) == 4) {
            if (uint16_t* copy = tile.view.members[first_member + e].copy; copy != nullptr) {
                Vector<BFloat16, kWidth> narrow;
#pragma unroll
                for (int j = 0; j < kWidth; ++j) narrow.lanes[j] = nearest<BFloat16>(v.lanes[j]);
                (kAligned ? ewa::store<BFloat16, kWidth> : store_anywhere<BFloat16, kWidth>)(copy, k, narrow);
            }
        }
    });
}

template <class T, int kHeld, bool kStep>
__device__ void run(const Tile<kStep>& tile) {
    const CudaGroup& group = tile.group;
    if constexpr (kStep) {
        auto* adams = reinterpret_cast<Adam<Wide<T>>*>(shared);
        for (int e = threadIdx.x; e < group.num_experts; e += blockDim.x) {
            const Member& member = tile.view.members[group.first_member + e];
            if (member.grad == nullptr) continue;
            const Options& options = tile.view.options[member.options];
            const double lr = read(options.lr, options.lr_at, options.lr_is_double);
            adams[e] = Adam<Wide<T>>::of(options, lr, *member.step, tile.grad_scale);
        }
        __syncthreads();
    }
    constexpr int width = vector_bytes / sizeof(T);
    constexpr int64_t tile_columns = tile_bytes / sizeof(T);
    const int64_t number = blockIdx.x - group.first_tile;
    const int64_t begin = number == 0 ? 0 : group.head + number * tile_columns;
    const int64_t end = min(group.numel, group.head + (number + 1) * tile_columns);
    const int64_t body = number == 0 ? min(static_cast<int64_t>(group.head), end) : begin;
    // Of parameters alone most are not aligned where one is not: they go by elements.
    const int64_t tail = kStep || group.aligned ? body + (end - body) / width * width : body;
    const auto for_each_vector = [&](const auto& act) {
        for (int64_t k = body + threadIdx.x * width; k < tail; k += blockDim.x * width) act(tile, k);
    };
    // Two loops: a look at each address costs loads that overlap, and ptxas spills where both are in one.
    if (!kStep || group.aligned)
        for_each_vector(columns<T, width, kHeld, true, kStep>);
    else
        for_each_vector(columns<T, width, kHeld, false, kStep>);
    for (int64_t i = threadIdx.x; i < body - begin + end - tail; i += blockDim.x)
        columns<T, 1, kHeld, true>(tile, i < body - begin ? begin + i : tail + i - (body - begin));
}

// Blocks that a multiprocessor must have registers for: told, ptxas does not spill to have more.
template <int kHeld, bool kStep>
constexpr int min_blocks = kHeld == 8 && kStep ? 1 : 2;

// Grid: one block for each tile of `tile_bytes` of every expert of a group.
template <int kHeld, bool kStep>
__global__ void __launch_bounds__(max_threads, min_blocks<kHeld, kStep>)
    parameter_pass(const __grid_constant__ Parameters<kStep> p) {
    if (p.scalars.found_inf != nullptr && *p.scalars.found_inf != 0) return;
    const View<kStep> view(p);
    int low = 0;
    for (int high = p.num_groups; high - low > 1;) {  // the last group that starts at this tile or before
        const int middle = (low + high) / 2;
        (view.groups[middle].first_tile <= blockIdx.x ? low : high) = middle;
    }
    const Scalars& s = p.scalars;
    const uint64_t seed = s.seed_at == nullptr ? s.seed : static_cast<uint64_t>(*s.seed_at);
    const double share_rate = read(s.share_rate, s.share_rate_at, s.share_rate_is_double);
    const Tile<kStep> tile{p, view, view.groups[low], share_rate, s.grad_scale == nullptr ? 1.0f : *s.grad_scale,
                           RandomKeys(seed)};
    if (!kStep && share_rate == 0) return;
    switch (static_cast<Type>(tile.group.type)) {
        case Type::float32: run<float, kHeld>(tile); break;
        case Type::float64: run<double, kHeld>(tile); break;
        case Type::float16: run<Half, kHeld>(tile); break;
        case Type::bfloat16: run<BFloat16, kHeld>(tile); break;
    }
    if constexpr (kStep) {
        // The last block to end counts the step, when all have read what it was; the counter wraps around to 0.
        __shared__ bool last;
        __syncthreads();
        if (threadIdx.x == 0) {
            __threadfence();
            last = atomicInc(p.counter, gridDim.x - 1) == gridDim.x - 1;
        }
        __syncthreads();
        if (last)
            for (int i = threadIdx.x; i < p.num_members; i += blockDim.x)
                if (view.members[i].grad != nullptr && view.members[i].counts) *view.members[i].step += 1;
    }
}

}  // namespace
}  // namespace ewa
