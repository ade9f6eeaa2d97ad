// The deal of tokens.
#pragma once

#include <cstdint>

namespace ewa {

// out[i] = the token of grouped row i, a permutation of 0 … num_tokens − 1; specified by ewa_kernels/reference.py.
void random_permutation(int64_t num_tokens, uint64_t seed, int32_t* out);

}  // namespace ewa
