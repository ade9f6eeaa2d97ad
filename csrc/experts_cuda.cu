#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "experts_cuda.cuh"

namespace ewa {
namespace {

void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

int size_of(Type type) { return type == Type::float64 ? 8 : type == Type::float32 ? 4 : 2; }

// Whether all members' tensors have the same place within 16 bytes, and how many elements come before the first
// boundary.
void plan_vectors(const Table& table, CudaGroup& group) {
    const int size = size_of(static_cast<Type>(group.type));
    const Member* members = table.members.data() + group.first_member;
    const auto offset = [](const void* at) { return reinterpret_cast<uintptr_t>(at) % vector_bytes; };
    const uintptr_t first = offset(members[0].param);
    const int64_t head = (vector_bytes - first) % vector_bytes / size;
    bool same = first % size == 0 && (size > 2 || head % 2 == 0);
    for (int e = 0; e < group.num_experts; ++e) {
        const Member& m = members[e];
        same = same && offset(m.param) == first;
        if (m.grad != nullptr)
            same = same && offset(m.grad) == first && offset(m.exp_avg) == first && offset(m.exp_avg_sq) == first;
        // Four elements of the copy at a time.
        same = same && (m.copy == nullptr || (reinterpret_cast<uintptr_t>(m.copy) + 2 * head) % 8 == 0);
    }
    group.vectors = same;
    group.head = same ? static_cast<int8_t>(head) : 0;
}

struct Plan {
    std::vector<char> table;
    int64_t num_tiles = 0;
    int max_experts = 1;
};

template <bool kStep>
Plan plan(const Table& table) {
    Plan plan;
    std::vector<CudaGroup> groups;
    for (const Group& g : table.groups) {
        if (g.numel == 0) continue;
        CudaGroup group{g.numel, plan.num_tiles, g.first_member, g.num_experts, g.number, static_cast<int16_t>(g.type)};
        plan_vectors(table, group);
        const int64_t tile_columns = tile_bytes / size_of(g.type);
        plan.num_tiles += std::max<int64_t>(1, (g.numel - group.head + tile_columns - 1) / tile_columns);
        plan.max_experts = std::max(plan.max_experts, g.num_experts);
        groups.push_back(group);
    }
    const auto append = [&](const auto& items) {
        const auto* bytes = reinterpret_cast<const char*>(items.data());
        plan.table.insert(plan.table.end(), bytes, bytes + items.size() * sizeof(items[0]));
    };
    append(groups);
    if constexpr (kStep) {
        append(table.members);
        append(table.options);
    } else {
        std::vector<void*> params;
        for (const Member& member : table.members) params.push_back(member.param);
        append(params);
    }
    return plan;
}

template <int kHeld, bool kStep>
void launch(const Plan& plan, Parameters<kStep>& p, int device, cudaStream_t stream) {
    // Of the widest type.
    p.adam_vectors = kStep ? plan.max_experts * sizeof(Adam<double>) / vector_bytes + 1 : 0;
    int threads = max_threads, limit = 0;
    check(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "shared memory");
    const auto kernel = experts_pass<kHeld, kStep>;
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
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(plan.num_tiles));
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = bytes;
    config.stream = stream;
    check(cudaLaunchKernelEx(&config, kernel, p), "launching experts_pass");
}

// In memory for one launch. A graph copies the table anew in each replay, so that it must stay on the host.
char* upload(const std::vector<char>& table, cudaStream_t stream) {
    cudaStreamCaptureStatus status;
    check(cudaStreamIsCapturing(stream, &status), "stream");
    const char* host = table.data();
    if (status != cudaStreamCaptureStatusNone) host = (new std::vector<char>(table))->data();
    void* in_memory = nullptr;
    check(cudaMallocAsync(&in_memory, table.size(), stream), "memory for the table");
    check(cudaMemcpyAsync(in_memory, host, table.size(), cudaMemcpyHostToDevice, stream), "copying the table");
    return static_cast<char*>(in_memory);
}

template <bool kStep>
void run_pass(const Table& table, const Scalars& scalars, uint32_t* counter, int device, cudaStream_t stream) {
    const Plan plan = ewa::plan<kStep>(table);
    if (plan.num_tiles == 0) return;
    if (plan.num_tiles > INT32_MAX) throw std::runtime_error("too many elements for one launch");
    Parameters<kStep> p{};
    p.scalars = scalars;
    p.counter = counter;
    p.num_members = static_cast<int32_t>(table.members.size());
    for (const Group& group : table.groups) p.num_groups += group.numel > 0;
    char* in_memory = nullptr;
    if (plan.table.size() <= sizeof(p.table))
        std::memcpy(p.table, plan.table.data(), plan.table.size());
    else
        p.in_memory = in_memory = upload(plan.table, stream);
    if (plan.max_experts <= 4)
        launch<4, kStep>(plan, p, device, stream);
    else if (plan.max_experts <= 8)
        launch<8, kStep>(plan, p, device, stream);
    else
        launch<0, kStep>(plan, p, device, stream);
    if (in_memory != nullptr) check(cudaFreeAsync(in_memory, stream), "freeing the table");
}

}  // namespace

void experts_pass_cuda(const Table& table, const Scalars& scalars, uint32_t* counter, int device, void* stream) {
    check(cudaSetDevice(device), "device");
    bool any_step = false;
    for (const Member& member : table.members) any_step = any_step || member.grad != nullptr || member.copy != nullptr;
    const auto pass = any_step ? run_pass<true> : run_pass<false>;
    pass(table, scalars, counter, device, static_cast<cudaStream_t>(stream));
}

std::pair<int, int> cuda_versions() {
    int driver = 0, runtime = 0;
    check(cudaDriverGetVersion(&driver), "driver's version");
    check(cudaRuntimeGetVersion(&runtime), "runtime's version");
    return {driver, runtime};
}

}  // namespace ewa
