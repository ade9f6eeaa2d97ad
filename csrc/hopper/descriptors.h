// How wgmma finds its operands in shared memory, for 16-bit types and the swizzle of 128 bytes.
//
//                        K-major                        MN-major
//   box of a TMA load    {64 k, rows}                   {64 mn, 64 k}, one load for every 64 mn
//   in shared memory     [rows][64 k]                   [mn / 64][64 k][64 mn], an atom is 8,192 bytes
//   stride offset        to the next 8 rows: 1,024      to the next 8 k: 1,024
//   leading offset       not used                       to the next 64 mn: 8,192
//   the next 16 k        + 32 bytes                     + 2,048 bytes
//   the next 64 rows     + 8,192 bytes                  + 8,192 bytes
#pragma once

#include <cstdint>

#include "../platform.h"

namespace ewa::hopper {

enum class Operand { bf16, f16 };

// Whether k or the other index (m of A, n of B) is contiguous in memory.
enum class Major { k, mn };

constexpr uint32_t swizzle_bytes = 128;
constexpr uint32_t atom_bytes = 8192;  // 64 rows of 128 bytes

// All offsets in bytes. Stages are aligned to 1,024 bytes, so that the base offset is 0.
EWA_ANYWHERE constexpr uint64_t make_descriptor(uint32_t address, uint32_t leading_bytes, uint32_t stride_bytes) {
    constexpr uint64_t swizzle_128 = 1;
    return static_cast<uint64_t>((address & 0x3FFFFu) >> 4) | static_cast<uint64_t>(leading_bytes >> 4) << 16 |
           static_cast<uint64_t>(stride_bytes >> 4) << 32 | swizzle_128 << 62;
}

template <Major kMajor>
EWA_ANYWHERE constexpr uint64_t make_descriptor(uint32_t address) {
    return make_descriptor(address, kMajor == Major::k ? 16 : atom_bytes, 1024);
}

// What is added to a descriptor to move it.
EWA_ANYWHERE constexpr uint64_t descriptor_step(uint32_t bytes) { return bytes >> 4; }

template <Major kMajor>
constexpr uint64_t descriptor_next_k16 = kMajor == Major::k ? 32 >> 4 : 2048 >> 4;

constexpr uint64_t descriptor_next_64_rows = atom_bytes >> 4;

// Where 16 bytes of a row are kept: chunk 0 … 7 of a row of 128 bytes, in memory aligned to 1,024 bytes.
EWA_ANYWHERE constexpr uint32_t swizzled_offset(uint32_t row, uint32_t chunk) {
    return row * swizzle_bytes + ((chunk ^ (row & 7)) << 4);
}

}  // namespace ewa::hopper
