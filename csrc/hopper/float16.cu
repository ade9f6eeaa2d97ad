#include "layer.cuh"

namespace ewa::hopper {

std::string run_float16(Call call, const Layer& layer, const Operands& operands) {
    return Products<Operand::f16>::run(call, layer, operands);
}

}  // namespace ewa::hopper
