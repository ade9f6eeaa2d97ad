#include "layer.cuh"

namespace ewa::hopper {

std::string run_float16(Call call, const Layer& layer, const Operands& operands) {
    return Products<Operand::f16>::run(call, layer, operands);
}

std::string forward_float16(const Layer& layer, const Operands& up, const Operands& down, uint32_t* flags) {
    return Products<Operand::f16>::forward(layer, up, down, flags);
}

std::string gather_float16(const Layer& layer, const Rows& rows, const Gathered& gathered) {
    return Products<Operand::f16>::gather(layer, rows, gathered);
}

}  // namespace ewa::hopper
