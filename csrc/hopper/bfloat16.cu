#include "layer.cuh"

namespace ewa::hopper {

std::string run_bfloat16(Call call, const Layer& layer, const Operands& operands) {
    return Products<Operand::bf16>::run(call, layer, operands);
}

}  // namespace ewa::hopper
