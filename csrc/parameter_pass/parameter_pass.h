// One pass over the parameters of a model: the AdamW step where there is a gradient, and Experts Weights Averaging.
//
// Knows nothing of torch: a table of addresses, sizes in elements, a stream. Nothing is checked here;
// ewa_kernels/kernels/parameter_pass.py does that. Every element is read once and written once; no result depends on the
// number of threads.
#pragma once

#include <array>
#include <cstdint>
#include <utility>
#include <vector>

#include "elements.h"

namespace ewa {

// One expert of a group, or a parameter that has no experts. All memory is dense and in the same order.
struct Member {
    void* param;
    void* grad;  // null: no AdamW step
    void* exp_avg;
    void* exp_avg_sq;
    float* step;     // how many steps were taken; becomes one more
    uint16_t* copy;  // bfloat16 copy of param, written too; or null
    int32_t options;
    int32_t counts;  // whether this member advances `step`: experts of one tensor share it
};

// Experts that are averaged with one another: members first_member … first_member + num_experts − 1.
struct Group {
    int64_t numel;  // of each member
    int32_t first_member;
    int32_t num_experts;
    int32_t number;  // of the first expert, among all experts of the call: what its random bits depend on
    Type type;
};

// Where a field of a member is: `offset` bytes after the address of one of the tensors given; nowhere if that is −1.
struct Place {
    int64_t tensor, offset;
};

// Kept from one pass to the next: what changes is addresses, which it tells from those that it holds, and options.
struct Table {
    std::vector<Group> groups;
    std::vector<Member> members;
    std::vector<Options> options;
    std::vector<std::array<Place, 6>> places;  // of each member's param, grad, exp_avg, exp_avg_sq, step and copy

    // Adds experts e = 0 … num_experts − 1 of one tensor, or a single one. `strides`: bytes from one to the next, of the
    // fields as in `places`.
    void add(int64_t num_experts, const std::array<int64_t, 6>& tensors, const std::array<int64_t, 6>& strides,
             int32_t options);
    // Whether anything is another than it was. Throws std::out_of_range if a tensor or its options are not given.
    bool set(const std::vector<uintptr_t>& addresses, std::vector<Options> given);
};

// Values for the whole pass. Where an address is given, the value is read there.
struct Scalars {
    double share_rate;
    const void* share_rate_at;
    int32_t share_rate_is_double;
    int32_t stochastic;  // 16-bit parameters are rounded so after averaging, or else to nearest
    uint64_t seed;
    const int64_t* seed_at;
    const float* grad_scale;  // gradients are divided by it, also in memory; or null
    const float* found_inf;   // if not 0 nothing changes; or null
};

void parameter_pass_cpu(const Table& table, const Scalars& scalars);

// A table as the kernel for GPUs reads it.
struct CudaPlan {
    explicit CudaPlan(const Table& given);

    std::vector<char> table;
    int64_t memory_bytes = 0;  // that a launch needs on the device; 0 where the table fits its parameters
    int64_t num_tiles = 0;
    int32_t num_groups = 0, num_members, max_experts = 1;
    bool steps = false;  // or writes copies
};

// `memory`: plan.memory_bytes, written in the order of the stream, aligned to 16. `counter`: one zero, for this stream,
// left zero; used if any member has a gradient. Throws std::runtime_error.
void parameter_pass_cuda(const CudaPlan& plan, const Scalars& scalars, void* memory, uint32_t* counter, int device,
                       void* stream);

// (newest CUDA that the driver knows, 0 without one; CUDA that this was built with), as 1000·major + 10·minor.
std::pair<int, int> cuda_versions();

}  // namespace ewa
