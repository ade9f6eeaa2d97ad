// The mean of experts.
#pragma once

#include <cstdint>

#include "elements.h"

namespace ewa {

// out [numel] = the mean of experts [num_experts, numel], summed up in float64 in their order and rounded once.
void merge_experts(const void* experts, int64_t num_experts, int64_t numel, Type type, void* out);

}  // namespace ewa
