#include "layer.cuh"

namespace ewa::hopper {

std::string run_bfloat16(Call call, const Layer& layer, const Operands& operands) {
    return Products<Operand::bf16>::run(call, layer, operands);
}

std::string forward_bfloat16(const Layer& layer, const Operands& up, const Operands& down, uint32_t* flags) {
    return Products<Operand::bf16>::forward(layer, up, down, flags);
}

std::string gather_bfloat16(const Layer& layer, const Rows& rows, const Gathered& gathered) {
    return Products<Operand::bf16>::gather(layer, rows, gathered);
}

}  // namespace ewa::hopper
