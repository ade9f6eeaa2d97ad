#include "layer.cuh"

namespace ewa::hopper {

std::string run_float16(Call call, const Layer& layer, const Operands& operands);

std::string run(Call call, const Layer& layer, const Operands& operands) {
    return (layer.is_bfloat16 ? Products<Operand::bf16>::run : run_float16)(call, layer, operands);
}

}  // namespace ewa::hopper
