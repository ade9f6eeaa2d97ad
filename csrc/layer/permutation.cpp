#include "permutation.h"

#include <cmath>
#include <vector>

#include "random.h"

namespace ewa {

constexpr int max_rounds = 24;

void random_permutation(int64_t num_tokens, uint64_t seed, int32_t* out) {
    if (num_tokens == 0) return;
    uint32_t keys[max_rounds + 4];
    for (int i = 0; i < max_rounds / 2 + 2; ++i) {
        const uint64_t word = seed_word(seed, i);
        keys[2 * i] = static_cast<uint32_t>(word);
        keys[2 * i + 1] = static_cast<uint32_t>(word >> 32);
    }
    const int rounds = num_tokens < 1024 ? max_rounds : 12;
    uint32_t a = static_cast<uint32_t>(std::sqrt(static_cast<double>(num_tokens)));
    while (static_cast<int64_t>(a) * a < num_tokens) ++a;
    while (a > 1 && static_cast<int64_t>(a - 1) * (a - 1) >= num_tokens) --a;
    const uint32_t b = static_cast<uint32_t>((num_tokens + a - 1) / a);

    // Only a + b values can enter a round function, so all of them are tabulated.
    std::vector<uint32_t> table(rounds / 2 * static_cast<size_t>(a + b));
    for (int i = 0; i < rounds; i += 2) {
        uint32_t* to_left = table.data() + i / 2 * static_cast<size_t>(a + b);
        for (uint32_t v = 0; v < b; ++v) to_left[v] = static_cast<uint64_t>(mix32(v ^ keys[i])) * a >> 32;
        for (uint32_t v = 0; v < a; ++v) to_left[b + v] = static_cast<uint64_t>(mix32(v ^ keys[i + 1])) * b >> 32;
    }
    const uint32_t coin = num_tokens > 1 ? keys[max_rounds] & 1 : 0;
#pragma omp parallel for schedule(static) if (num_tokens > 4096)
    for (int64_t row = 0; row < num_tokens; ++row) {
        uint32_t point = static_cast<uint32_t>(row < 2 ? row ^ coin : row);
        do {
            uint32_t right = point / a, left = point - right * a;
            for (const uint32_t* t = table.data(); t != table.data() + table.size(); t += a + b) {
                left += t[right];
                left -= left >= a ? a : 0;
                right += t[b + left];
                right -= right >= b ? b : 0;
            }
            point = right * a + left;
        } while (point >= num_tokens);
        out[row] = static_cast<int32_t>(point);
    }
}

}  // namespace ewa
