#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "cuda.cuh"

namespace ewa {
namespace {

void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

int size_of(Type type) { return type == Type::float64 ? 8 : type == Type::float32 ? 4 : 2; }

// Vectors begin where the first parameter is aligned; of 16-bit tensors at an even element, because two share a hash.
void plan_vectors(const Member* members, CudaGroup& group) {
    const int size = size_of(static_cast<Type>(group.type));
    const auto offset = [](const void* at) { return reinterpret_cast<uintptr_t>(at) % vector_bytes; };
    const uintptr_t first = offset(members[0].param);
    const int64_t head = (vector_bytes - first) % vector_bytes / size;
    group.head = static_cast<int8_t>(size > 2 ? head : head & ~1);
    bool aligned = (first + group.head * size) % vector_bytes == 0;
    for (int e = 0; e < group.num_experts; ++e) {
        const Member& m = members[e];
        aligned = aligned && offset(m.param) == first;
        if (m.grad != nullptr)
            for (const void* at : {m.grad, m.exp_avg, m.exp_avg_sq}) aligned = aligned && offset(at) == first;
        // Four elements of the copy at a time.
        aligned = aligned && (m.copy == nullptr || (reinterpret_cast<uintptr_t>(m.copy) + 2 * group.head) % 8 == 0);
    }
    group.aligned = aligned;
}

template <class Kernel, class P>
void launch(Kernel kernel, const P& p, int64_t blocks, int threads, int shared_bytes, cudaStream_t stream) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    check(cudaLaunchKernelEx(&config, kernel, p), "launching a kernel");
}

template <int kHeld, bool kStep>
void launch_pass(const CudaPlan& plan, Parameters<kStep>& p, int device, cudaStream_t stream) {
    // Of the widest type.
    p.adam_vectors = kStep ? plan.max_experts * sizeof(Adam<double>) / vector_bytes + 1 : 0;
    int threads = max_threads, limit = 0;
    check(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "shared memory");
    const auto kernel = parameter_pass<kHeld, kStep>;
    if (kHeld == 0) {
        cudaFuncAttributes attributes;
        check(cudaFuncGetAttributes(&attributes, kernel), "shared memory");
        // What the kernel declares itself counts against the same limit.
        const int room = (limit - static_cast<int>(attributes.sharedSizeBytes)) / vector_bytes - p.adam_vectors;
        while (threads > 32 && plan.max_experts * threads > room) threads /= 2;
        p.staged = std::min(plan.max_experts, room / threads);
    }
    const int bytes = (p.adam_vectors + p.staged * threads) * vector_bytes;
    if (bytes > 48 * 1024)
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "shared memory");
    launch(kernel, p, plan.num_tiles, threads, bytes, stream);
}

// By launches that have it in their parameters: nothing waits for a copy, and a graph's replay writes it again.
void write(const std::vector<char>& table, char* memory, cudaStream_t stream) {
    for (size_t at = 0; at < table.size(); at += chunk_bytes) {
        const size_t size = std::min<size_t>(chunk_bytes, table.size() - at);
        Chunk chunk{};
        std::memcpy(chunk.bytes, table.data() + at, size);
        chunk.to = reinterpret_cast<uint4*>(memory + at);
        chunk.vectors = static_cast<int32_t>(size / vector_bytes);
        launch(write_table, chunk, (chunk.vectors + max_threads - 1) / max_threads, max_threads, 0, stream);
    }
}

template <bool kStep>
void run_pass(const CudaPlan& plan, const Scalars& scalars, char* memory, uint32_t* counter, int device,
              cudaStream_t stream) {
    Parameters<kStep> p{};
    p.scalars = scalars;
    p.counter = counter;
    p.num_groups = plan.num_groups;
    p.num_members = plan.num_members;
    if (plan.memory_bytes == 0) {
        std::memcpy(p.table, plan.table.data(), plan.table.size());
    } else {
        write(plan.table, memory, stream);
        p.in_memory = memory;
    }
    if (plan.max_experts <= 4)
        launch_pass<4, kStep>(plan, p, device, stream);
    else if (plan.max_experts <= 8)
        launch_pass<8, kStep>(plan, p, device, stream);
    else
        launch_pass<0, kStep>(plan, p, device, stream);
}

}  // namespace

CudaPlan::CudaPlan(const Table& given) : num_members(static_cast<int32_t>(given.members.size())) {
    for (const Member& member : given.members) steps = steps || member.grad != nullptr || member.copy != nullptr;
    std::vector<CudaGroup> groups;
    for (const Group& g : given.groups) {
        if (g.numel == 0) continue;
        CudaGroup group{g.numel, num_tiles, g.first_member, g.num_experts, g.number, static_cast<int16_t>(g.type)};
        plan_vectors(&given.members[g.first_member], group);
        const int64_t tile_columns = tile_bytes / size_of(g.type);
        num_tiles += std::max<int64_t>(1, (g.numel - group.head + tile_columns - 1) / tile_columns);
        max_experts = std::max(max_experts, g.num_experts);
        groups.push_back(group);
    }
    num_groups = static_cast<int32_t>(groups.size());
    const auto append = [&](const auto& items) {
        const auto* bytes = reinterpret_cast<const char*>(items.data());
        table.insert(table.end(), bytes, bytes + items.size() * sizeof(items[0]));
    };
    append(groups);
    if (steps) {
        append(given.members);
        append(given.options);
    } else {
        std::vector<void*> params;
        for (const Member& member : given.members) params.push_back(member.param);
        append(params);
    }
    table.resize((table.size() + vector_bytes - 1) / vector_bytes * vector_bytes);
    const size_t room = steps ? table_bytes<true> : table_bytes<false>;
    if (table.size() > room) memory_bytes = static_cast<int64_t>(table.size());
}

void parameter_pass_cuda(const CudaPlan& plan, const Scalars& scalars, void* memory, uint32_t* counter, int device,
                       void* stream) {
    if (plan.num_tiles == 0) return;
    if (plan.num_tiles > INT32_MAX) throw std::runtime_error("too many elements for one launch");
    check(cudaSetDevice(device), "device");
    const auto pass = plan.steps ? run_pass<true> : run_pass<false>;
    pass(plan, scalars, static_cast<char*>(memory), counter, device, static_cast<cudaStream_t>(stream));
}

std::pair<int, int> cuda_versions() {
    int driver = 0, runtime = 0;
    check(cudaDriverGetVersion(&driver), "driver's version");
    check(cudaRuntimeGetVersion(&runtime), "runtime's version");
    return {driver, runtime};
}

}  // namespace ewa
