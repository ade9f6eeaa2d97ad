// How programs are tried in the model: in which modes, with which numbers, and what is printed.
#pragma once

#include <cstring>

#include "machine.h"

namespace ewa::machine {

// When copies land and products are executed.
struct Mode {
    const char* name;
    When copies, products;
};
constexpr Mode modes[] = {
    {"late", When::late, When::late},
    {"random", When::random, When::random},
    {"at_once", When::at_once, When::at_once},
    {"late_products", When::at_once, When::late},
};

inline Options options_in(const Mode& mode, uint32_t seed) {
    Options options;
    options.seed = seed;
    options.tma = options.cp_async = mode.copies;
    options.wgmma = mode.products;
    return options;
}

// Null for a name that no mode has.
inline const Mode* mode_named(const char* name) {
    for (const Mode& mode : modes)
        if (strcmp(mode.name, name) == 0) return &mode;
    return nullptr;
}

inline std::string in_one_line(std::string said) {
    std::replace(said.begin(), said.end(), '\n', ';');
    return said;
}

// Small whole numbers: their products' sums are exact in float32, in whatever order.
inline float small_number(uint32_t i) { return static_cast<float>((i * 2654435761u >> 13) % 7) - 3.0f; }

}  // namespace ewa::machine
