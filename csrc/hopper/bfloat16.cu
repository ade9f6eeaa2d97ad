#include "layer.cuh"

namespace ewa::hopper {

std::string run_float16(Call call, const Layer& layer, const Operands& operands);

// That with which the clusters of an H200 are done first: 1,024 cycles a step, some 1,500 until a tile of a part is
// stored, and what memory takes to write and read the parts. Not of the device at hand: the order of sums, and so their
// bits, would depend on it.
int splits_of(const Layer& layer, int size_m, int size_n) {
    constexpr int clusters = 66, most = 8;
    const int of_expert = tiles_of(size_m, 2 * tile_rows) * tiles_of(size_n, weight_columns);
    const int64_t tiles = int64_t{layer.num_experts} * of_expert;
    const int64_t numel = int64_t{layer.num_experts} * size_m * size_n;
    const int steps = tiles_of(layer.slots(), step_depth);
    int best = 1;
    int64_t least = INT64_MAX;
    for (int splits = 1; splits <= most && splits <= steps; ++splits) {
        const int64_t of_tile = int64_t{1024} * tiles_of(steps, splits) + (splits == 1 ? 400 : 1500);
        const int64_t of_parts = splits == 1 ? 0 : splits * numel * 27 / 10000;  // 8 bytes, 2,950 a cycle
        const int64_t cycles = tiles_of(tiles * splits, clusters) * of_tile + of_parts;
        if (cycles < least) best = splits, least = cycles;
    }
    return best;
}

std::string run(Call call, const Layer& layer, const Operands& operands) {
    return (layer.is_bfloat16 ? Products<Operand::bf16>::run : run_float16)(call, layer, operands);
}

}  // namespace ewa::hopper
