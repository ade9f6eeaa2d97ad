#include "layer.cuh"

namespace ewa::hopper {

std::string float16_up(const Layer&, const void*, const void*, Bias, void*, void*);
std::string float16_down(const Layer&, const void*, const void*, Bias, const int32_t*, void*);

std::string up_projection(const Layer& layer, const void* x, const void* up_weight, Bias bias, void* hidden,
                          void* pre_activation) {
    return (layer.is_bfloat16 ? up_projection_of<Operand::bf16> : float16_up)(layer, x, up_weight, bias, hidden,
                                                                              pre_activation);
}

std::string down_projection(const Layer& layer, const void* hidden, const void* down_weight, Bias bias,
                            const int32_t* permutation, void* y) {
    return (layer.is_bfloat16 ? down_projection_of<Operand::bf16> : float16_down)(layer, hidden, down_weight, bias,
                                                                                 permutation, y);
}

}  // namespace ewa::hopper
