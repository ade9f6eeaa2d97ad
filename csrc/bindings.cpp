// The Python module ewa_kernels._C: addresses and sizes in, nothing out. The kernels run without the
// interpreter lock.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "exchange/exchange.h"
#include "hopper/bindings.h"
#include "layer/codec.h"
#include "layer/merge.h"
#include "layer/moe_ffn.h"
#include "layer/permutation.h"
#include "layer/products.h"
#include "layer/rows.h"
#include "parameter_pass/parameter_pass.h"

namespace py = pybind11;

namespace {

using ewa::pointer;

// (address, type) of rows, as ewa_kernels/kernels/blocked/cpp_rows.py gives them.
using Matrix = std::pair<uintptr_t, int32_t>;

ewa::Matrix matrix(const Matrix& given) { return {pointer<void>(given.first), static_cast<ewa::Type>(given.second)}; }

// Those that `rows` says, or all, in order.
ewa::Tokens rows_of(const Matrix& tokens, uintptr_t rows) {
    return {matrix(tokens), pointer<const int64_t>(rows), nullptr};
}

ewa::Inputs inputs(uintptr_t x, uintptr_t up_weight, uintptr_t up_bias, uintptr_t down_weight, uintptr_t down_bias,
                   uintptr_t routing_weights, uint64_t seed, uintptr_t permutation, uintptr_t pre_activation) {
    return {pointer<void>(x),         pointer<void>(up_weight), pointer<void>(up_bias),
            pointer<void>(down_weight), pointer<void>(down_bias), pointer<const float>(routing_weights),
            seed,                      pointer<int32_t>(permutation), pointer<void>(pre_activation)};
}

// (first_scale, num_fixed, levels, edges)
using CodebookRow = std::tuple<int64_t, int64_t, std::array<float, 16>, std::array<float, 15>>;

ewa::Codebook codebook(const CodebookRow& row) {
    const auto& [first_scale, num_fixed, levels, edges] = row;
    return {first_scale, num_fixed, levels, edges};
}

ewa::Kept kept(const ewa::Format& format, uintptr_t codes, uintptr_t scales) {
    return {{nullptr, ewa::Type::float32}, &format, pointer<uint8_t>(codes), pointer<uint8_t>(scales)};
}

// From rows of numbers: see ewa_kernels/kernels/parameter_pass.py. A row is a tensor: of each field which of the
// tensors given it is, of each field how many bytes there are from one expert to the next, and which options it has.
ewa::Table table_of(const std::vector<std::tuple<int64_t, int32_t, int32_t, int32_t, bool>>& groups,
                    const std::vector<std::tuple<std::array<int64_t, 6>, std::array<int64_t, 6>, int32_t>>& rows) {
    ewa::Table table;
    auto row = rows.begin();
    for (const auto& [numel, num_experts, number, type, stacked] : groups) {
        table.groups.push_back({numel, static_cast<int32_t>(table.members.size()), num_experts, number,
                                static_cast<ewa::Type>(type)});
        for (int32_t i = 0; i < (stacked ? 1 : num_experts); ++i, ++row) {
            if (row == rows.end()) throw std::out_of_range("rows");
            const auto& [tensors, strides, options] = *row;
            table.add(stacked ? num_experts : 1, tensors, strides, options);
        }
    }
    return table;
}

// (lr, its address or 0, whether it is a double there, beta1, beta2, eps, weight_decay, maximize)
using OptionsRow = std::tuple<double, uintptr_t, bool, double, double, double, double, bool>;

bool set_table(ewa::Table& table, const std::vector<uintptr_t>& addresses, const std::vector<OptionsRow>& rows) {
    std::vector<ewa::Options> options;
    for (const auto& [lr, lr_at, lr_is_double, beta1, beta2, eps, weight_decay, maximize] : rows)
        options.push_back({lr, pointer<const void>(lr_at), beta1, beta2, eps, weight_decay, lr_is_double, maximize});
    return table.set(addresses, std::move(options));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "C++ kernels of ewa_kernels; see the headers in csrc/";
    const auto unlocked = py::call_guard<py::gil_scoped_release>();
    const py::module_local local;  // Hugging Face's kernels may load a second copy in one process

    py::enum_<ewa::Activation>(m, "Activation", local)
        .value("gelu", ewa::Activation::gelu)
        .value("gelu_tanh", ewa::Activation::gelu_tanh)
        .value("quick_gelu", ewa::Activation::quick_gelu)
        .value("relu", ewa::Activation::relu)
        .value("relu2", ewa::Activation::relu2)
        .value("silu", ewa::Activation::silu)
        .value("identity", ewa::Activation::identity);

    m.def(
        "random_permutation",
        [](int64_t num_tokens, uint64_t seed, uintptr_t out) {
            ewa::random_permutation(num_tokens, seed, pointer<int32_t>(out));
        },
        unlocked);
    m.def(
        "gather_rows",
        [](Matrix in, uintptr_t tokens, int64_t n, int64_t d, Matrix out) {
            ewa::gather_rows(matrix(in), pointer<const int64_t>(tokens), n, d, matrix(out));
        },
        unlocked);
    m.def(
        "scatter_rows",
        [](Matrix in, uintptr_t bias, uintptr_t factor, uintptr_t tokens, int64_t n, int64_t rows_per_expert, int64_t d,
           Matrix out) {
            ewa::scatter_rows(matrix(in), pointer<const float>(bias), pointer<const float>(factor),
                              pointer<const int64_t>(tokens), n, rows_per_expert, d, matrix(out));
        },
        unlocked);
    py::class_<ewa::Block>(m, "Block", local)
        .def(py::init([](int64_t n, int64_t rows_per_expert, int64_t d_ff, bool gated, uintptr_t rows, uint64_t seed,
                         double dropout_p) {
            return ewa::Block{n, rows_per_expert, d_ff, gated, pointer<const int64_t>(rows), seed, dropout_p};
        }));
    m.def(
        "activate",
        [](ewa::Activation activation, const ewa::Block& block, uintptr_t bias, Matrix product, Matrix pre,
           Matrix hidden) {
            ewa::activate(activation, block, pointer<const float>(bias), matrix(product), matrix(pre), matrix(hidden));
        },
        unlocked);
    m.def(
        "activate_backward",
        [](ewa::Activation activation, const ewa::Block& block, Matrix pre, Matrix grad_hidden, uintptr_t factor,
           Matrix grad_pre, Matrix hidden, uintptr_t grad_factor) {
            ewa::activate_backward(activation, block, matrix(pre), matrix(grad_hidden), pointer<const float>(factor),
                                   matrix(grad_pre), matrix(hidden), pointer<float>(grad_factor));
        },
        unlocked);

    py::class_<ewa::Format, std::shared_ptr<ewa::Format>>(m, "Format", local)
        .def(py::init([](int64_t bits, const std::vector<float>& scales, const CodebookRow& symmetric,
                         const std::vector<CodebookRow>& parts) {
            ewa::Format format{bits, scales, codebook(symmetric), {}};
            for (const CodebookRow& row : parts) format.parts.push_back(codebook(row));
            return std::make_shared<ewa::Format>(std::move(format));
        }));
    m.def(
        "encode_rows",
        [](const ewa::Format& format, Matrix in, int64_t n, int64_t columns, uintptr_t codes, uintptr_t scales) {
            ewa::encode_rows(matrix(in), n, columns, kept(format, codes, scales));
        },
        unlocked);
    m.def(
        "decode_rows",
        [](const ewa::Format& format, uintptr_t codes, uintptr_t scales, int64_t n, int64_t columns, Matrix out) {
            ewa::decode_rows(kept(format, codes, scales), n, columns, matrix(out));
        },
        unlocked);
    m.def(
        "encode_gradient",
        [](Matrix from, int64_t n, uintptr_t codes, uintptr_t scales, uintptr_t residual) {
            ewa::encode_gradient(matrix(from), n, pointer<int8_t>(codes), pointer<uint16_t>(scales),
                                 pointer<float>(residual));
        },
        unlocked);
    m.def(
        "decode_gradient",
        [](uintptr_t codes, uintptr_t scales, int64_t n, Matrix to) {
            ewa::decode_gradient(pointer<const int8_t>(codes), pointer<const uint16_t>(scales), n, matrix(to));
        },
        unlocked);
    m.def(
        "sum_gradients",
        [](uintptr_t codes, uintptr_t scales, int64_t count, int64_t stride, int64_t n, float factor, uintptr_t to) {
            ewa::sum_gradients(pointer<const int8_t>(codes), pointer<const uint16_t>(scales), count, stride, n, factor,
                               pointer<float>(to));
        },
        unlocked);
    m.def(
        "merge_experts",
        [](uintptr_t experts, int64_t num_experts, int64_t numel, int32_t type, uintptr_t out) {
            ewa::merge_experts(pointer<const void>(experts), num_experts, numel, static_cast<ewa::Type>(type),
                               pointer<void>(out));
        },
        unlocked);
    m.def("have_products", [](int32_t type) { return ewa::have_products(static_cast<ewa::Type>(type)); });
    py::class_<ewa::TimesWeights>(m, "TimesWeights", local)
        .def(py::init([](const std::vector<int64_t>& counts, int64_t k, int64_t n, Matrix tokens, uintptr_t rows,
                         Matrix weights, bool transposed, bool bfloat16) {
            return ewa::TimesWeights{ewa::Groups(counts), k, n, rows_of(tokens, rows), {matrix(weights), transposed},
                                     bfloat16};
        }))
        .def_property_readonly("workspace_bytes",
                               [](const ewa::TimesWeights& product) { return 4 * ewa::workspace_floats(product); })
        .def(
            "multiply",
            [](const ewa::TimesWeights& product, uintptr_t workspace, uintptr_t bias, uintptr_t rows, Matrix out) {
                ewa::multiply(product, pointer<float>(workspace), nullptr,
                              ewa::scatter_to_rows(product.n, pointer<const float>(bias), nullptr,
                                                   pointer<const int64_t>(rows), matrix(out)));
            },
            unlocked);
    py::class_<ewa::Outer>(m, "Outer", local)
        .def(py::init([](const std::vector<int64_t>& counts, int64_t m, int64_t n, Matrix left, uintptr_t left_rows,
                         Matrix right, uintptr_t right_rows, bool bfloat16) {
            return ewa::Outer{ewa::Groups(counts), m, n, rows_of(left, left_rows), rows_of(right, right_rows), bfloat16};
        }))
        .def_property_readonly("workspace_bytes",
                               [](const ewa::Outer& product) { return 4 * ewa::workspace_floats(product); })
        .def(
            "multiply",
            [](const ewa::Outer& product, uintptr_t workspace, Matrix out, uintptr_t sums) {
                ewa::multiply(product, pointer<float>(workspace), 0, matrix(out), pointer<float>(sums));
            },
            unlocked);
    py::class_<ewa::Layer>(m, "Layer", local)
        .def(py::init([](int64_t num_tokens, int64_t top_k, int64_t num_experts, int64_t d_model, int64_t d_ff,
                         ewa::Activation activation, bool gated, double dropout_p, bool bfloat16, int32_t tokens,
                         const std::array<int32_t, 4>& types, std::shared_ptr<ewa::Format> format) {
            const auto type = [](int32_t number) { return static_cast<ewa::Type>(number); };
            return ewa::Layer{num_tokens, top_k,     num_experts,    d_model,        d_ff,
                              activation, gated,     dropout_p,      type(tokens),   bfloat16,
                              type(types[0]), type(types[1]), type(types[2]), type(types[3]), std::move(format)};
        }));
    py::class_<ewa::LayerPass>(m, "LayerPass", local)
        .def(py::init([](const ewa::Layer& layer, uintptr_t expert_offsets, int64_t block_rows, bool backward) {
            return ewa::LayerPass(layer, pointer<const int32_t>(expert_offsets), block_rows, backward);
        }))
        .def_property_readonly("num_blocks", &ewa::LayerPass::num_blocks)
        .def_property_readonly("counts", &ewa::LayerPass::counts)
        .def_property_readonly("memory_bytes", &ewa::LayerPass::memory_bytes)
        .def(
            "forward",
            [](const ewa::LayerPass& pass, uintptr_t x, uintptr_t up_weight, uintptr_t up_bias, uintptr_t down_weight,
               uintptr_t down_bias, uintptr_t routing_weights, uint64_t seed, uintptr_t permutation, bool deal,
               uintptr_t y, uintptr_t pre_activation, uintptr_t memory) {
                pass.forward(inputs(x, up_weight, up_bias, down_weight, down_bias, routing_weights, seed, permutation,
                                    pre_activation),
                             deal, pointer<void>(y), pointer<char>(memory));
            },
            unlocked)
        .def(
            "backward",
            [](const ewa::LayerPass& pass, uintptr_t grad_y, uintptr_t x, uintptr_t up_weight, uintptr_t up_bias,
               uintptr_t down_weight, uintptr_t routing_weights, uint64_t seed, uintptr_t permutation,
               uintptr_t pre_activation, uintptr_t grad_x, Matrix grad_up_weight, uintptr_t grad_up_bias,
               Matrix grad_down_weight, uintptr_t grad_down_bias, uintptr_t grad_routing, uintptr_t of_bias_factor,
               uintptr_t memory) {
                const ewa::Gradients gradients{pointer<void>(grad_x),         matrix(grad_up_weight),
                                               matrix(grad_down_weight),      pointer<float>(grad_up_bias),
                                               pointer<float>(grad_down_bias), pointer<float>(grad_routing),
                                               pointer<const float>(of_bias_factor)};
                pass.backward(inputs(x, up_weight, up_bias, down_weight, 0, routing_weights, seed, permutation,
                                     pre_activation),
                              pointer<const void>(grad_y), gradients, pointer<char>(memory));
            },
            unlocked);

    py::class_<ewa::Table>(m, "Table", local).def(py::init(&table_of)).def("set", &set_table);
    py::class_<ewa::Scalars>(m, "Scalars", local)
        .def(py::init([](double share_rate, uintptr_t share_rate_at, bool share_rate_is_double, bool stochastic,
                         uint64_t seed, uintptr_t seed_at, uintptr_t grad_scale, uintptr_t found_inf) {
            return ewa::Scalars{share_rate,
                                pointer<const void>(share_rate_at),
                                share_rate_is_double,
                                stochastic,
                                seed,
                                pointer<const int64_t>(seed_at),
                                pointer<const float>(grad_scale),
                                pointer<const float>(found_inf)};
        }));
    m.def("parameter_pass_cpu", &ewa::parameter_pass_cpu, unlocked);
#ifdef EWA_CUDA
    py::class_<ewa::CudaPlan>(m, "CudaPlan", local)
        .def(py::init<const ewa::Table&>(), unlocked)
        .def_readonly("memory_bytes", &ewa::CudaPlan::memory_bytes);
    m.def(
        "parameter_pass_cuda",
        [](const ewa::CudaPlan& plan, const ewa::Scalars& scalars, uintptr_t memory, uintptr_t counter, int device,
           uintptr_t stream) {
            ewa::parameter_pass_cuda(plan, scalars, pointer<void>(memory), pointer<uint32_t>(counter), device,
                                   pointer<void>(stream));
        },
        unlocked);
    m.def("cuda_versions", &ewa::cuda_versions);
#ifdef EWA_HOPPER
    ewa::hopper::bind(m);
    m.attr("hopper") = true;
#else
    m.attr("hopper") = false;
#endif
    m.attr("cuda") = EWA_CUDA;
#else
    m.attr("cuda") = py::none();
    m.attr("hopper") = false;
#endif
}
