// Small kernels for the model of the machine, each right or with one fault: tests/test_machine.py knows which.
#pragma once

#include <string>
#include <vector>

#include "hopper/instructions.cuh"
#include "trials.h"

namespace programs {

using namespace ewa;
using namespace ewa::hopper;
using machine::Grid;
using machine::launch;
using machine::make_tensor_map;
using machine::small_number;
using machine::Options;

// Returns what the model said, or else what is wrong with the values, or an empty string.
struct Program {
    const char* name;
    std::string (*run)(const Options&);
};

extern const std::vector<Program> barrier_programs, warp_programs, copy_programs, hand_off_programs, product_programs,
    gemm_programs;

inline int warp_id() { return thread_id() / 32; }
inline int lane_id() { return thread_id() % 32; }

struct Matrix {
    int rows, columns;
    Operand type;
    std::vector<uint16_t> bits;

    Matrix(int rows, int columns, Operand type = Operand::bf16, uint32_t seed = 1)
        : rows(rows), columns(columns), type(type) {
        const auto size = static_cast<uint32_t>(rows * columns);
        for (uint32_t i = 0; i < size; ++i) bits.push_back(of(small_number(i + 977 * seed)));
    }
    uint16_t of(float v) const { return type == Operand::bf16 ? nearest<BFloat16>(v).bits : nearest<Half>(v).bits; }
    float operator()(int row, int column) const {
        const uint16_t v = bits[static_cast<size_t>(row * columns + column)];
        return type == Operand::bf16 ? widen(BFloat16{v}) : widen(Half{v});
    }
    TensorMap map(int box_columns, int box_rows, int swizzle = 128) {
        return make_tensor_map(bits.data(), 2, {columns, rows}, {columns * 2}, {box_columns, box_rows}, swizzle);
    }
};

// What is said, or the first place where values are not as `expected(i)`; NaN is not equal to anything.
template <class T, class Expected>
std::string compare(std::string said, const std::vector<T>& values, Expected&& expected) {
    for (size_t i = 0; said.empty() && i < values.size(); ++i) {
        const auto right = static_cast<T>(expected(static_cast<int>(i)));
        if (!(values[i] == right))
            said = "values: " + std::to_string(values[i]) + " at " + std::to_string(i) + ", not " +
                   std::to_string(right);
    }
    return said;
}

}  // namespace programs
