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
    const int64_t places = layer.is_given ? 1 : layer.num_experts, slots = layer.slots() / places;
    return {data, columns, slots, places, row_stride, row_stride * slots};
}

// A weight of every expert, [rows, columns].
inline Operand3d weight_of(const Layer& layer, const void* data, int64_t rows, int64_t columns) {
    return {data, columns, rows, layer.num_experts, columns, rows * columns};
}

inline const void* after(const void* data, int64_t elements) { return static_cast<const uint16_t*>(data) + elements; }

inline Owners owners_of(const Layer& layer, const int32_t* permutation, int32_t* dealt = nullptr) {
    const Deal deal{layer.seed, static_cast<uint32_t>(layer.num_rows), layer.radix_a, layer.radix_b, layer.rounds};
    return {deal, permutation, dealt, layer.top_k};
}

inline Groups groups_of(const Layer& layer) { return {layer.num_rows, layer.num_experts, layer.table}; }

inline int pairs_of(const Layer& layer) { return pairs_of(layer.num_rows, layer.num_experts, layer.is_given); }

// Tiles of what is by slot, with so many columns of them, and steps of a sum of K.
inline Work work_of(const Layer& layer, int columns, int size_k) {
    return {pairs_of(layer), columns, layer.is_given ? 1 : layer.num_experts, tiles_of(size_k, step_depth)};
}

template <Operand kType>
struct Products {
    // --- up projection ---

    // kWithDown: in one launch with the down projection.
    template <class Act, bool kGated, bool kDropout, bool kGathers, bool kWithDown = false>
    struct Up {
        // With 192 columns dropout, or another product behind, would spill registers; gated, 128 are 64 of hidden.
        static constexpr int columns = kGated || kDropout || kWithDown ? 128 : 192;
        static constexpr int width = kGated ? columns / 2 : columns;
        using OfProduct = Shape<kType, Major::k, Major::k, columns, 4, true, kGathers>;
        using Epilogue = StoreHidden<kType, columns, Act, kGated, kDropout>;

        static Task<Epilogue> task(const Layer& layer, const Operands& o, std::string& error) {
            const int d = layer.d_model, f = layer.d_ff, num_up = layer.num_up();
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
                maps.out[i] =
                    make_map(by_slot(layer, after(o.pre_activation, (i - 1) * int64_t{f}), f, num_up), 64, error);
            return {maps, work_of(layer, tiles_of(f, width), d), groups_of(layer),
                    Gather{o.rows.data, d, owners_of(layer, o.rows.permutation, o.rows.dealt)},
                    {o.bias, f, layer.dropout(), o.pre_activation != nullptr}};
        }

        static std::string run(const Layer& layer, const Operands& o) {
            std::string error;
            const Task<Epilogue> of_up = task(layer, o, error);
            return error.empty() ? launch_product<OfProduct>(of_up, layer.where) : error;
        }

        // And the down projection, in the same launch.
        static std::string run_with_down(const Layer& layer, const Operands& o, const Operands& of_down,
                                         uint32_t* flags) {
            using Down = Scattered<Major::k>;
            std::string error;
            const Task<Epilogue> first = task(layer, o, error);
            const auto second = Down::task(layer, of_down, layer.d_ff, down_weight(layer, of_down), error);
            const HandOver hand_over{flags, first.work.columns, second.work.columns};
            if (!error.empty()) return error;
            return launch_pair<OfProduct, Epilogue, typename Down::OfProduct, typename Down::Epilogue>(
                first, second, hand_over, layer.where);
        }
    };

    // To keep the binary small: rows are found by the product for the activations that most models have.
    template <class Act>
    static constexpr bool can_gather = std::is_same_v<Act, Gelu> || std::is_same_v<Act, Silu>;

    template <class Act, bool kGated>
    static std::string up_of(const Layer& layer, const Operands& o) {
        constexpr bool gathers = can_gather<Act>;
        if (o.rows.by_token && !gathers) return "rows by token are for gelu and silu";
        const bool drops = layer.dropout_threshold != 0;
        const auto by_token = drops ? Up<Act, kGated, true, gathers>::run : Up<Act, kGated, false, gathers>::run;
        const auto by_slot = drops ? Up<Act, kGated, true, false>::run : Up<Act, kGated, false, false>::run;
        return (o.rows.by_token ? by_token : by_slot)(layer, o);
    }

    template <class Act, bool kGated>
    static std::string forward_of(const Layer& layer, const Operands& up, const Operands& down, uint32_t* flags) {
        const auto both = layer.dropout_threshold != 0 ? Up<Act, kGated, true, true, true>::run_with_down
                                                       : Up<Act, kGated, false, true, true>::run_with_down;
        return both(layer, up, down, flags);
    }

    static std::string forward(const Layer& layer, const Operands& up, const Operands& down, uint32_t* flags) {
        if (layer.activation == Activation::gelu)
            return (layer.gated ? forward_of<Gelu, true> : forward_of<Gelu, false>)(layer, up, down, flags);
        if (layer.activation == Activation::silu)
            return (layer.gated ? forward_of<Silu, true> : forward_of<Silu, false>)(layer, up, down, flags);
        return "one launch is for gelu and silu";
    }

    // --- down projection, and gradients of x ---

    template <Major kMajorB>
    struct Scattered {
        static constexpr int columns = 256;
        using OfProduct = Shape<kType, Major::k, kMajorB, columns, 4, false>;
        using Epilogue = StoreScattered<kType, columns>;

        static Task<Epilogue> task(const Layer& layer, const Operands& o, int size_k, const Operand3d& b,
                                   std::string& error) {
            Maps<Epilogue> maps;
            maps.a = make_map(by_slot(layer, o.a, size_k), tile_rows, error);
            maps.b[0] = maps.b[1] = make_map(b, kMajorB == Major::k ? columns / 2 : 64, error);
            return {maps, work_of(layer, tiles_of(layer.d_model, columns), size_k), groups_of(layer), {},
                    {o.bias, o.routing_weights, owners_of(layer, o.permutation), o.out.data, layer.d_model}};
        }

        static std::string run(const Layer& layer, const Operands& o, int size_k, const Operand3d& b) {
            std::string error;
            const Task<Epilogue> of_product = task(layer, o, size_k, b, error);
            return error.empty() ? launch_product<OfProduct>(of_product, layer.where) : error;
        }
    };

    static Operand3d down_weight(const Layer& layer, const Operands& o) {
        return weight_of(layer, o.b, layer.d_model, layer.d_ff);
    }

    // --- grad_pre ---

    template <class Act, bool kGated, bool kScaled>
    static std::string grad_pre(const Layer& layer, const Operands& o) {
        constexpr int columns = 128;
        // Gated, three blocks go out and two come in: a stage less.
        using OfProduct = Shape<kType, Major::k, Major::mn, columns, kGated ? 3 : 4, true>;
        using Epilogue = StoreGradPre<kType, columns, Act, kGated, kScaled>;
        const int f = layer.d_ff, num_up = kGated ? 2 * f : f;
        std::string error;
        Maps<Epilogue> maps;
        maps.a = make_map(by_slot(layer, o.a, layer.d_model), tile_rows, error);
        maps.b[0] = maps.b[1] = make_map(down_weight(layer, o), 64, error);
        for (int i = 0; i < Epilogue::inputs; ++i) {
            maps.in[i] = make_map(by_slot(layer, after(o.pre_activation, int64_t{i} * f), f, num_up), 64, error);
            maps.out[i] = make_map(by_slot(layer, after(o.out.data, int64_t{i} * f), f, num_up), 64, error);
        }
        maps.out[Epilogue::outputs - 1] = make_map(by_slot(layer, o.hidden, f), 64, error);
        if (!error.empty()) return error;
        const Owners owners = owners_of(layer, o.permutation);
        const Task<Epilogue> task{
            maps, work_of(layer, tiles_of(f, columns), layer.d_model), groups_of(layer), {},
            {layer.dropout(), o.routing_weights, owners, o.partial_routing, f, layer.num_rows}};
        return launch_product<OfProduct>(task, layer.where);
    }

    // --- gradients of weights ---

    template <bool kParts>
    static std::string weight_in(const Layer& layer, const Operands& o, void* to, int splits) {
        using OfProduct = Shape<kType, Major::mn, Major::mn, weight_columns, 4, false>;
        using Epilogue = StoreSummed<kType, kParts>;
        std::string error;
        Maps<Epilogue> maps;
        maps.a = make_map(by_slot(layer, o.a, o.size_m), 64, error);
        maps.b[0] = maps.b[1] = make_map(by_slot(layer, o.b, o.size_n), 64, error);
        Operand3d out = weight_of(layer, to, o.size_m, o.size_n);
        out.experts *= splits;
        out.is_float32 = kParts;
        maps.out[0] = make_map(out, 64, error);
        if (!error.empty()) return error;
        // Where groups are given, each expert has its own number of steps.
        const int slots = tiles_of(layer.num_rows, layer.num_experts);
        const Work work{tiles_of(o.size_m, 2 * tile_rows), tiles_of(o.size_n, weight_columns),
                        layer.num_experts * splits, tiles_of(tiles_of(slots, step_depth), splits), splits};
        const Task<Epilogue> task{maps, work, groups_of(layer), {}, {o.part_sums, o.size_m, splits}};
        return launch_product<OfProduct>(task, layer.where);
    }

    // What is asked for in float32 is made in that, as parts are.
    static std::string weight(const Layer& layer, const Operands& o) {
        const int splits = o.splits;
        const bool by_parts = splits > 1 || o.out.type == float32;
        void* to = splits > 1 ? o.parts : o.out.data;
        std::string error = (by_parts ? weight_in<true> : weight_in<false>)(layer, o, to, splits);
        if (error.empty() && splits > 1)
            error = launch_sum(o.parts, layer.num_experts, splits, int64_t{o.size_m} * o.size_n, o.out, layer);
        if (error.empty() && o.part_sums != nullptr)
            error = launch_sum(o.part_sums, layer.num_experts, splits, o.size_m, o.sums, layer);
        return error;
    }

    // --- rows by slot ---

    static std::string gather(const Layer& layer, const Rows& rows, const Gathered& to) {
        const int pairs = pairs_of(layer), blocks = pairs * (layer.is_given ? 1 : layer.num_experts) * 4;
        const int most = 8 * layer.where.multiprocessors;
        const GatherArguments arguments{rows.data, to, layer.d_model, owners_of(layer, rows.permutation, rows.dealt),
                                        groups_of(layer), pairs};
        return launch_simple(gather_kernel<kType>, blocks < most ? blocks : most, gather_threads, layer.where,
                             arguments);
    }

    // --- all of them ---

    template <bool kGated, class Act>
    static std::string activated(Call call, const Layer& layer, const Operands& o) {
        if (call == Call::up) return up_of<Act, kGated>(layer, o);
        const bool is_scaled = layer.dropout_threshold != 0 || o.routing_weights != nullptr;
        return (is_scaled ? grad_pre<Act, kGated, true> : grad_pre<Act, kGated, false>)(layer, o);
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
        const int d = layer.d_model, num_up = layer.num_up();
        if (call == Call::down) return Scattered<Major::k>::run(layer, o, layer.d_ff, down_weight(layer, o));
        if (call == Call::grad_x) return Scattered<Major::mn>::run(layer, o, num_up, weight_of(layer, o.b, num_up, d));
        if (call == Call::grad_weight) return weight(layer, o);
        return (layer.gated ? activated<true> : activated<false>)(call, layer, o);
    }
};

}  // namespace ewa::hopper
