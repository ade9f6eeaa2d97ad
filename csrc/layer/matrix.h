// Rows of memory, and what is done to one row of any of them.
#pragma once

#include <cstdint>

#include "elements.h"

namespace ewa {

// Rows of a type, which may be another one than that of the next matrix: not float64.
struct Matrix {
    void* at;
    Type type;

    int64_t element_size() const { return type == Type::float32 ? sizeof(float) : sizeof(uint16_t); }
    const char* element(int64_t i) const { return static_cast<const char*>(at) + i * element_size(); }
};

// To float32 from 16 bits, and back.
void widen_row(Type type, int64_t n, const uint16_t* from, float* to);
void narrow_row(Type type, int64_t n, const float* from, uint16_t* to);
// n elements, from element `from` on to element `to`, rounded if `out` is narrower. One of the two is float32, or both are
// of one type.
void convert(const Matrix& in, int64_t from, int64_t n, const Matrix& out, int64_t to);
// What is finite stays so in float16, which ends at 65,504.
void saturate_row(int64_t n, float* row);

}  // namespace ewa
