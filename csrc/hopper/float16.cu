#include "layer.cuh"

namespace ewa::hopper {

std::string run_float16(Call call, const Layer& layer, const Operands& operands) {
    return Products<Operand::f16>::run(call, layer, operands);
}

std::string gather_float16(const Layer& layer, const Rows& rows, const Gathered& gathered) {
    return Products<Operand::f16>::gather(layer, rows, gathered);
}

}  // namespace ewa::hopper
