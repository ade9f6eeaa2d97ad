// csrc/hopper for Python, as a part of a module: addresses and sizes in, nothing out.
#include "bindings.h"

#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "layer.h"

namespace py = pybind11;

namespace ewa::hopper {
namespace {

// A seed, or where it is; the table of groups that are given; see `Where`.
using OfCall = std::tuple<uint64_t, uintptr_t, uintptr_t, int, int, uintptr_t, bool>;
using Number = std::pair<uintptr_t, int>;                       // address and NumberType
using RowsOf = std::tuple<uintptr_t, bool, uintptr_t, uintptr_t>;  // see `Rows`

Bias bias_of(const Number& given) { return {pointer(given.first), given.second}; }
Output output_of(const Number& given) { return {pointer(given.first), given.second}; }

Layer with(Layer layer, const OfCall& given) {
    const auto& [seed, seed_at, table, device, multiprocessors, stream, overlaps] = given;
    layer.seed = {seed, pointer(seed_at)};
    layer.table = pointer<const int32_t>(table);
    layer.where = {device, multiprocessors, pointer(stream), overlaps};
    return layer;
}

Rows rows_of(const RowsOf& given) {
    const auto& [data, by_token, permutation, dealt] = given;
    return {pointer(data), by_token, pointer<const int32_t>(permutation), pointer<int32_t>(dealt)};
}

void check(const std::string& said) {
    if (!said.empty()) throw std::runtime_error("backend=\"hopper\": " + said);
}

}  // namespace

void bind(py::module_& m) {
    const py::module_local local;  // the tests' module may be loaded beside ewa_kernels._C
    py::enum_<Activation>(m, "HopperActivation", local)
        .value("gelu", Activation::gelu)
        .value("gelu_tanh", Activation::gelu_tanh)
        .value("quick_gelu", Activation::quick_gelu)
        .value("silu", Activation::silu)
        .value("relu", Activation::relu)
        .value("relu2", Activation::relu2)
        .value("identity", Activation::identity);
    py::enum_<Call>(m, "HopperCall", local)
        .value("up", Call::up)
        .value("down", Call::down)
        .value("grad_pre", Call::grad_pre)
        .value("grad_x", Call::grad_x)
        .value("grad_weight", Call::grad_weight);
    py::class_<Layer>(m, "HopperLayer", local)
        .def(py::init([](bool is_bfloat16, int num_rows, int num_experts, int d_model, int d_ff, int top_k,
                         bool is_given, Activation activation, bool gated, std::array<uint32_t, 3> radices,
                         uint32_t dropout_threshold, float dropout_scale) {
            Layer layer;
            layer.is_bfloat16 = is_bfloat16;
            layer.num_rows = num_rows;
            layer.num_experts = num_experts;
            layer.d_model = d_model;
            layer.d_ff = d_ff;
            layer.top_k = top_k;
            layer.is_given = is_given;
            layer.activation = activation;
            layer.gated = gated;
            layer.radix_a = radices[0];
            layer.radix_b = radices[1];
            layer.rounds = radices[2];
            layer.dropout_threshold = dropout_threshold;
            layer.dropout_scale = dropout_scale;
            return layer;
        }))
        .def_property_readonly("slots", &Layer::slots)
        .def_property_readonly("table_size", &Layer::table_size)
        .def_property_readonly("num_flags", &Layer::num_flags)
        .def("splits_of", &splits_of);

    m.def("hopper_tabulate", [](const Layer& layer, const OfCall& of_call, uintptr_t expert_offsets, uintptr_t table) {
        check(tabulate(with(layer, of_call), pointer<const int32_t>(expert_offsets), pointer<int32_t>(table)));
    });
    m.def("hopper_gather", [](const Layer& layer, const OfCall& of_call, const RowsOf& rows, uintptr_t x,
                              uintptr_t grad_y, uintptr_t of_grad_y, uintptr_t weighted, uintptr_t routing_weights) {
        const Gathered to{pointer(x), pointer(grad_y), pointer(of_grad_y), pointer(weighted),
                          pointer<const float>(routing_weights)};
        check(gather(with(layer, of_call), rows_of(rows), to));
    });
    m.def("hopper_forward",
          [](const Layer& layer, const OfCall& of_call, const RowsOf& rows, uintptr_t up_weight, Number up_bias,
             uintptr_t pre_activation, uintptr_t hidden, uintptr_t down_weight, Number down_bias, uintptr_t permutation,
             uintptr_t routing_weights, Number out, uintptr_t flags) {
              Operands up, down;
              up.rows = rows_of(rows);
              up.b = pointer(up_weight);
              up.bias = bias_of(up_bias);
              up.pre_activation = pointer(pre_activation);
              up.hidden = pointer(hidden);
              down.a = pointer(hidden);
              down.b = pointer(down_weight);
              down.bias = bias_of(down_bias);
              down.permutation = pointer<const int32_t>(permutation);
              down.routing_weights = pointer<const float>(routing_weights);
              down.out = output_of(out);
              check(forward(with(layer, of_call), up, down, pointer<uint32_t>(flags)));
          });
    const Number none{0, 0};
    m.def(
        "hopper_product",
        [](Call call, const Layer& layer, const OfCall& of_call, const RowsOf& rows, uintptr_t a, uintptr_t b,
           Number bias, uintptr_t permutation, uintptr_t routing_weights, uintptr_t partial_routing,
           uintptr_t pre_activation, uintptr_t hidden, Number out, int size_m, int size_n, int splits,
           uintptr_t parts, uintptr_t part_sums, Number sums) {
            Operands o;
            o.rows = rows_of(rows);
            o.a = pointer(a);
            o.b = pointer(b);
            o.bias = bias_of(bias);
            o.permutation = pointer<const int32_t>(permutation);
            o.routing_weights = pointer<const float>(routing_weights);
            o.partial_routing = pointer<float>(partial_routing);
            o.pre_activation = pointer(pre_activation);
            o.hidden = pointer(hidden);
            o.out = output_of(out);
            o.size_m = size_m;
            o.size_n = size_n;
            o.splits = splits;
            o.parts = pointer<float>(parts);
            o.part_sums = pointer<float>(part_sums);
            o.sums = output_of(sums);
            check(run(call, with(layer, of_call), o));
        },
        py::arg("call"), py::arg("layer"), py::arg("of_call"), py::kw_only(), py::arg("rows") = RowsOf{},
        py::arg("a") = 0, py::arg("b") = 0, py::arg("bias") = none, py::arg("permutation") = 0,
        py::arg("routing_weights") = 0, py::arg("partial_routing") = 0, py::arg("pre_activation") = 0,
        py::arg("hidden") = 0, py::arg("out") = none, py::arg("size_m") = 0, py::arg("size_n") = 0,
        py::arg("splits") = 1, py::arg("parts") = 0, py::arg("part_sums") = 0, py::arg("sums") = none);
}

}  // namespace ewa::hopper
