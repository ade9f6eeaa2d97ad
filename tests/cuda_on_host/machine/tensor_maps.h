// Tensors as TMA sees them: boxes, with zeros outside of the tensor, swizzled in shared memory.
#pragma once

#include "memory.h"

namespace ewa::machine {

// 2-D or 3-D, the innermost dimension first; strides in bytes, of all dimensions but the innermost.
inline TensorMap make_tensor_map(void* base, int element_bytes, std::vector<int64_t> size, std::vector<int64_t> stride,
                                 std::vector<int> box, int swizzle = 128) {
    TensorMap map;
    map.base = static_cast<uint8_t*>(base);
    map.rank = static_cast<int>(size.size());
    map.element_bytes = element_bytes;
    map.swizzle = swizzle;
    map.stride[0] = element_bytes;
    for (size_t i = 0; i < size.size() && i < 3; ++i) {
        map.size[i] = size[i];
        map.box[i] = box[i];
        if (i > 0) map.stride[i] = stride[i - 1];
    }
    return map;
}

inline void check_tensor_map(const TensorMap& map, int rank) {
    if (map.rank != rank) fail("TMA: a tensor map of another rank");
    if (reinterpret_cast<uintptr_t>(map.base) % 16 != 0) fail("TMA: misaligned tensor");
    for (int i = 1; i < rank; ++i)
        if (map.stride[i] % 16 != 0 || map.stride[i] <= 0) fail("TMA: misaligned stride");
    for (int i = 0; i < rank; ++i)
        if (map.box[i] < 1 || map.box[i] > 256 || map.size[i] < 1) fail("TMA: size or box out of range");
    const int inner_bytes = map.box[0] * map.element_bytes;
    if (inner_bytes % 16 != 0) fail("TMA: a box's rows are not whole chunks of 16 bytes");
    if (map.swizzle != 0 && map.swizzle != 32 && map.swizzle != 64 && map.swizzle != 128) fail("TMA: swizzle");
    if (map.swizzle != 0 && inner_bytes > map.swizzle) fail("TMA: a box's rows are wider than the swizzle");
    if (map.swizzle != 0 && inner_bytes < map.swizzle) fail("TMA: the model knows no rows narrower than the swizzle");
}

// Hardware asks for 128 bytes. Where no whole pattern begins, the swizzle would start in its middle, which no kernel of
// ours wants.
inline void check_box_address(const Cta& cta, const TensorMap& map, uint32_t address) {
    shared_index(cta, address, static_cast<uint32_t>(map.box_bytes()), map.swizzle == 0 ? 128 : 8 * map.swizzle);
}

// 16-byte chunks change places with others of the same row, by bits 7 and up of the address.
inline uint32_t swizzled(uint32_t address, int swizzle) {
    const uint32_t mask = swizzle == 0 ? 0 : static_cast<uint32_t>(swizzle / 16 - 1);
    return address ^ (address >> 7 & mask) << 4;
}

// Calls act(address in shared memory, in global memory, first and one past the last byte that are in the tensor) for
// each chunk of 16 bytes of a box.
template <class Act>
void for_each_chunk(const TensorMap& map, uint32_t shared, const std::array<int, 3>& at, Act&& act) {
    const int elements = 16 / map.element_bytes;
    uint32_t address = shared;
    for (int z = at[2]; z < at[2] + map.box[2]; ++z)
        for (int y = at[1]; y < at[1] + map.box[1]; ++y)
            for (int x = at[0]; x < at[0] + map.box[0]; x += elements, address += 16) {
                const bool inside = y >= 0 && y < map.size[1] && z >= 0 && z < map.size[2];
                const int64_t first = std::clamp<int64_t>(-x, 0, elements);
                const int64_t last = inside ? std::clamp<int64_t>(map.size[0] - x, first, elements) : first;
                uint8_t* global = map.base + z * map.stride[2] + y * map.stride[1] + x * map.stride[0];
                act(swizzled(address, map.swizzle), global, static_cast<size_t>(first) * map.element_bytes,
                    static_cast<size_t>(last) * map.element_bytes);
            }
}

}  // namespace ewa::machine

namespace ewa::hopper {

using TensorMap = machine::TensorMap;

}  // namespace ewa::hopper
