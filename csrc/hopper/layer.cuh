// The products of layer.h for one 16-bit type; bfloat16.cu and float16.cu are compiled side by side.
#pragma once

#include "epilogues.cuh"
#include "launch.cuh"
#include "layer.h"

namespace ewa::hopper {
namespace {

int tiles_of(int64_t size, int tile) { return static_cast<int>((size + tile - 1) / tile); }

// Rows of slots of `columns`.
Operand3d by_slot(const Layer& layer, const void* data, int64_t columns, int64_t row_stride = 0) {
    if (row_stride == 0) row_stride = columns;
    return {data, columns, layer.slots(), layer.num_experts, row_stride, row_stride * layer.slots()};
}

Vector vector_of(const Bias& bias) { return {bias.data, bias.type}; }

// [E, F or 2F, D], or of a gated projection half of it.
Operand3d up_weight_of(const Layer& layer, const void* data, bool values) {
    const int64_t half = static_cast<int64_t>(layer.d_ff) * layer.d_model;
    const auto* from = static_cast<const uint16_t*>(data) + (values ? half : 0);
    return {from, layer.d_model, layer.d_ff, layer.num_experts, layer.d_model, layer.gated ? 2 * half : half};
}

template <Operand kType, class Act, bool kGated, bool kDropout>
std::string up(const Layer& layer, const void* x, const void* up_weight, Bias bias, void* hidden, void* pre) {
    // With 192 columns dropout would spill registers; gated, 128 are 64 of hidden.
    constexpr int columns = kGated || kDropout ? 128 : 192;
    using OfProduct = Shape<kType, Major::k, Major::k, columns, 4, true>;
    using Epilogue = StoreHidden<kType, columns, Act, kGated, kDropout>;
    std::string error;
    Maps<Epilogue::outputs> maps;
    maps.a = make_map(by_slot(layer, x, layer.d_model), tile_rows, error);
    for (int i = 0; i < 2; ++i)
        maps.b[i] = make_map(up_weight_of(layer, up_weight, kGated && i == 1), columns / 2, error);
    maps.out[0] = make_map(by_slot(layer, hidden, layer.d_ff), 64, error);
    for (int i = 1; i < Epilogue::outputs; ++i) {  // pre_activation, or gates and values
        if (pre == nullptr) continue;
        const auto* first = static_cast<uint16_t*>(pre) + (i == 2 ? layer.d_ff : 0);
        maps.out[i] = make_map(by_slot(layer, first, layer.d_ff, (kGated ? 2 : 1) * int64_t{layer.d_ff}), 64, error);
    }
    if (!error.empty()) return error;
    const Work work{tiles_of(layer.slots(), 2 * tile_rows), tiles_of(layer.d_ff, kGated ? columns / 2 : columns),
                    layer.num_experts, tiles_of(layer.d_model, step_depth)};
    const typename Epilogue::Arguments arguments{
        vector_of(bias),  layer.d_ff,  layer.num_rows, layer.num_experts, layer.seed, layer.threshold, layer.scale,
        pre == nullptr ? 1 : Epilogue::outputs};
    return launch_product<OfProduct, Epilogue>(maps, work, arguments, layer.multiprocessors, layer.stream);
}

template <Operand kType, class Act, bool kGated>
std::string up_by_form(const Layer& layer, const void* x, const void* up_weight, Bias bias, void* hidden, void* pre) {
    return (layer.threshold != 0 ? up<kType, Act, kGated, true> : up<kType, Act, kGated, false>)(layer, x, up_weight,
                                                                                               bias, hidden, pre);
}

template <Operand kType, class Act>
std::string up_by_gate(const Layer& layer, const void* x, const void* up_weight, Bias bias, void* hidden, void* pre) {
    return (layer.gated ? up_by_form<kType, Act, true> : up_by_form<kType, Act, false>)(layer, x, up_weight, bias,
                                                                                       hidden, pre);
}

template <Operand kType>
std::string up_projection_of(const Layer& layer, const void* x, const void* up_weight, Bias bias, void* hidden,
                             void* pre) {
    constexpr decltype(&up_by_gate<kType, Gelu>) table[] = {
        up_by_gate<kType, Gelu>,  up_by_gate<kType, GeluTanh>, up_by_gate<kType, QuickGelu>, up_by_gate<kType, Silu>,
        up_by_gate<kType, Relu>, up_by_gate<kType, Relu2>,    up_by_gate<kType, Identity>,
    };
    return table[static_cast<int>(layer.activation)](layer, x, up_weight, bias, hidden, pre);
}

template <Operand kType>
std::string down_projection_of(const Layer& layer, const void* hidden, const void* down_weight, Bias bias,
                 const int32_t* permutation, void* y) {
    constexpr int columns = 256;
    using OfProduct = Shape<kType, Major::k, Major::k, columns, 4, false>;
    using Epilogue = StoreScattered<kType, columns>;
    std::string error;
    Maps<Epilogue::outputs> maps;
    maps.a = make_map(by_slot(layer, hidden, layer.d_ff), tile_rows, error);
    const int64_t size = static_cast<int64_t>(layer.d_model) * layer.d_ff;
    maps.b[0] = make_map({down_weight, layer.d_ff, layer.d_model, layer.num_experts, layer.d_ff, size}, columns / 2, error);
    maps.b[1] = maps.b[0];
    maps.out[0] = maps.a;  // scattered: not by TMA
    if (!error.empty()) return error;
    const Work work{tiles_of(layer.slots(), 2 * tile_rows), tiles_of(layer.d_model, columns), layer.num_experts,
                    tiles_of(layer.d_ff, step_depth)};
    const typename Epilogue::Arguments arguments{vector_of(bias), permutation,    y,
                                                 layer.d_model,   layer.num_rows, layer.num_experts};
    return launch_product<OfProduct, Epilogue>(maps, work, arguments, layer.multiprocessors, layer.stream);
}

}  // namespace
}  // namespace ewa::hopper
