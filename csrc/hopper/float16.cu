#include "layer.cuh"

namespace ewa::hopper {

std::string float16_up(const Layer& layer, const void* x, const void* up_weight, Bias bias, void* hidden,
                       void* pre_activation) {
    return up_projection_of<Operand::f16>(layer, x, up_weight, bias, hidden, pre_activation);
}

std::string float16_down(const Layer& layer, const void* hidden, const void* down_weight, Bias bias,
                         const int32_t* permutation, void* y) {
    return down_projection_of<Operand::f16>(layer, hidden, down_weight, bias, permutation, y);
}

}  // namespace ewa::hopper
