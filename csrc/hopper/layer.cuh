// The products of layer.h for one 16-bit type; bfloat16.cu and float16.cu are compiled side by side.
#pragma once

#include <iterator>
#include <type_traits>

#include "epilogues.cuh"
#include "launch.cuh"
#include "layer.h"

namespace ewa::hopper {

// Rows by slot, of `columns`; those of a wider tensor are `row_stride` apart.
inline Operand3d by_slot(const Layer& layer, const void* data, int64_t columns, int64_t row_stride = 0) {
    if (row_stride == 0) row_stride = columns;
    return {data, columns, layer.slots(), layer.num_experts, row_stride, row_stride * layer.slots()};
}

// A weight of every expert, [rows, columns].
inline Operand3d weight_of(const Layer& layer, const void* data, int64_t rows, int64_t columns) {
    return {data, columns, rows, layer.num_experts, columns, rows * columns};
}

inline const void* after(const void* data, int64_t elements) { return static_cast<const uint16_t*>(data) + elements; }

inline Gather gather_of(const Layer& layer, const Rows& rows) {
    const Deal deal{rows.seed, static_cast<uint32_t>(layer.num_rows), rows.radix_a, rows.radix_b, rows.rounds};
    return {rows.data, layer.d_model,    layer.num_rows, layer.num_experts,
            deal,      rows.permutation, rows.dealt,     rows.top_k};
}

template <Operand kType>
struct Products {
    // --- up projection ---

    template <class Act, bool kGated, bool kDropout, bool kGathers>
    static std::string up(const Layer& layer, const Operands& o) {
        // With 192 columns dropout would spill registers; gated, 128 are 64 of hidden.
        constexpr int columns = kGated || kDropout ? 128 : 192, width = kGated ? columns / 2 : columns;
        using OfProduct = Shape<kType, Major::k, Major::k, columns, 4, true, kGathers>;
        using Epilogue = StoreHidden<kType, columns, Act, kGated, kDropout>;
        const int d = layer.d_model, f = layer.d_ff, num_up = kGated ? 2 * f : f;
        std::string error;
        Maps<Epilogue> maps;
        if (!kGathers) maps.a = make_map(by_slot(layer, o.rows.data, d), tile_rows, error);
        const auto weight = [&](int first_row) {
            const void* from = after(o.b, int64_t{first_row} * d);
            return make_map({from, d, f, layer.num_experts, d, int64_t{num_up} * d}, columns / 2, error);
        };
        maps.b[0] = weight(0);
        maps.b[1] = kGated ? weight(f) : maps.b[0];  // gates, and values
        maps.out[0] = make_map(by_slot(layer, o.hidden, f), 64, error);
        for (int i = 1; i < Epilogue::outputs && o.pre_activation != nullptr; ++i)
            maps.out[i] = make_map(by_slot(layer, after(o.pre_activation, (i - 1) * int64_t{f}), f, num_up), 64, error);
        const Work work{tiles_of(layer.slots(), 2 * tile_rows), tiles_of(f, width), layer.num_experts,
                        tiles_of(d, step_depth)};
        const typename Epilogue::Arguments arguments{
            o.bias, f, layer.num_rows, layer.num_experts, layer.dropout, o.pre_activation != nullptr};
        if (!error.empty()) return error;
        const Gather rows = gather_of(layer, o.rows);
        return launch_product<OfProduct, Epilogue>(maps, work, rows, arguments, layer.multiprocessors, layer.stream);
    }

    template <class Act, bool kGated>
    static std::string up_of(const Layer& layer, const Operands& o) {
        // To keep the binary small: rows are found by the product for the activations that most models have.
        constexpr bool can_gather = std::is_same_v<Act, Gelu> || std::is_same_v<Act, Silu>;
        if (o.rows.by_token && !can_gather) return "rows by token are for gelu and silu";
        const bool drops = layer.dropout.threshold != 0;
        const auto by_token = drops ? up<Act, kGated, true, can_gather> : up<Act, kGated, false, can_gather>;
        const auto by_slot = drops ? up<Act, kGated, true, false> : up<Act, kGated, false, false>;
        return (o.rows.by_token ? by_token : by_slot)(layer, o);
    }

    // --- down projection, and gradients of x ---

    template <Major kMajorB>
    static std::string scattered(const Layer& layer, const Operands& o, int size_k, const Operand3d& b) {
        constexpr int columns = 256;
        using OfProduct = Shape<kType, Major::k, kMajorB, columns, 4, false>;
        using Epilogue = StoreScattered<kType, columns>;
        std::string error;
        Maps<Epilogue> maps;
        maps.a = make_map(by_slot(layer, o.a, size_k), tile_rows, error);
        maps.b[0] = maps.b[1] = make_map(b, kMajorB == Major::k ? columns / 2 : 64, error);
        if (!error.empty()) return error;
        const Work work{tiles_of(layer.slots(), 2 * tile_rows), tiles_of(layer.d_model, columns), layer.num_experts,
                        tiles_of(size_k, step_depth)};
        const typename Epilogue::Arguments arguments{o.bias,        o.permutation,  o.out,
                                                     layer.d_model, layer.num_rows, layer.num_experts};
        return launch_product<OfProduct, Epilogue>(maps, work, {}, arguments, layer.multiprocessors, layer.stream);
    }

    // --- grad_pre ---

    template <class Act, bool kGated, bool kDropout>
    static std::string grad_pre(const Layer& layer, const Operands& o) {
        constexpr int columns = 128;
        // Gated, three blocks go out and two come in: a stage less.
        using OfProduct = Shape<kType, Major::k, Major::mn, columns, kGated ? 3 : 4, true>;
        using Epilogue = StoreGradPre<kType, columns, Act, kGated, kDropout>;
        const int f = layer.d_ff, num_up = kGated ? 2 * f : f;
        std::string error;
        Maps<Epilogue> maps;
        maps.a = make_map(by_slot(layer, o.a, layer.d_model), tile_rows, error);
        maps.b[0] = maps.b[1] = make_map(weight_of(layer, o.b, layer.d_model, f), 64, error);
        for (int i = 0; i < Epilogue::inputs; ++i) {
            maps.in[i] = make_map(by_slot(layer, after(o.pre_activation, int64_t{i} * f), f, num_up), 64, error);
            maps.out[i] = make_map(by_slot(layer, after(o.out, int64_t{i} * f), f, num_up), 64, error);
        }
        maps.out[Epilogue::outputs - 1] = make_map(by_slot(layer, o.hidden, f), 64, error);
        if (!error.empty()) return error;
        const Work work{tiles_of(layer.slots(), 2 * tile_rows), tiles_of(f, columns), layer.num_experts,
                        tiles_of(layer.d_model, step_depth)};
        const typename Epilogue::Arguments arguments{layer.num_rows, layer.num_experts, layer.dropout};
        return launch_product<OfProduct, Epilogue>(maps, work, {}, arguments, layer.multiprocessors, layer.stream);
    }

    // --- gradients of weights ---

    template <bool kParts>
    static std::string weight_in(const Layer& layer, const Operands& o, int splits) {
        using OfProduct = Shape<kType, Major::mn, Major::mn, weight_columns, 4, false>;
        using Epilogue = StoreSummed<kType, kParts>;
        std::string error;
        Maps<Epilogue> maps;
        maps.a = make_map(by_slot(layer, o.a, o.size_m), 64, error);
        maps.b[0] = maps.b[1] = make_map(by_slot(layer, o.b, o.size_n), 64, error);
        Operand3d out = weight_of(layer, kParts ? o.parts : o.out, o.size_m, o.size_n);
        out.experts *= splits;
        out.is_float32 = kParts;
        maps.out[0] = make_map(out, 64, error);
        if (!error.empty()) return error;
        const Work work{tiles_of(o.size_m, 2 * tile_rows), tiles_of(o.size_n, weight_columns), layer.num_experts,
                        tiles_of(tiles_of(layer.slots(), step_depth), splits), splits};
        return launch_product<OfProduct, Epilogue>(maps, work, {}, {o.part_sums, o.size_m, splits},
                                                   layer.multiprocessors, layer.stream);
    }

    static std::string weight(const Layer& layer, const Operands& o) {
        const int splits = splits_of(layer, o.size_m, o.size_n);
        const auto sum = [&](const float* parts, int64_t size, void* out, int type) {
            return launch_sum(parts, layer.num_experts, splits, size, out, type, layer.multiprocessors, layer.stream);
        };
        std::string error = splits == 1 ? weight_in<false>(layer, o, 1) : weight_in<true>(layer, o, splits);
        if (error.empty() && splits > 1)
            error = sum(o.parts, int64_t{o.size_m} * o.size_n, o.out, kType == Operand::bf16 ? bfloat16 : float16);
        if (error.empty() && o.part_sums != nullptr)
            error = sum(o.part_sums, o.size_m, o.sums.data, o.sums.type);
        return error;
    }

    // --- all of them ---

    template <bool kGated, class Act>
    static std::string activated(Call call, const Layer& layer, const Operands& o) {
        if (call == Call::up) return up_of<Act, kGated>(layer, o);
        return (layer.dropout.threshold != 0 ? grad_pre<Act, kGated, true> : grad_pre<Act, kGated, false>)(layer, o);
    }

    template <bool kGated>
    static std::string activated(Call call, const Layer& layer, const Operands& o) {
        constexpr decltype(&activated<kGated, Gelu>) table[] = {
            activated<kGated, Gelu>, activated<kGated, GeluTanh>, activated<kGated, QuickGelu>, activated<kGated, Silu>,
            activated<kGated, Relu>, activated<kGated, Relu2>,    activated<kGated, Identity>,
        };
        static_assert(std::size(table) == static_cast<size_t>(Activation::identity) + 1, "in the order of Activation");
        return table[static_cast<int>(layer.activation)](call, layer, o);
    }

    static std::string run(Call call, const Layer& layer, const Operands& o) {
        const int d = layer.d_model, f = layer.d_ff, num_up = layer.gated ? 2 * f : f;
        if (call == Call::down) return scattered<Major::k>(layer, o, f, weight_of(layer, o.b, d, f));
        if (call == Call::grad_x) return scattered<Major::mn>(layer, o, num_up, weight_of(layer, o.b, num_up, d));
        if (call == Call::grad_weight) return weight(layer, o);
        return (layer.gated ? activated<true> : activated<false>)(call, layer, o);
    }
};

}  // namespace ewa::hopper
