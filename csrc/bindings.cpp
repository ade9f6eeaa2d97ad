// The Python module ewa_kernels._C: addresses and sizes in, nothing out. The interpreter lock is released.
#include <pybind11/pybind11.h>

#include "cpu.h"

namespace py = pybind11;

namespace {

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "C++ kernels of ewa_kernels; see csrc/cpu.h";
    const auto unlocked = py::call_guard<py::gil_scoped_release>();

    py::enum_<ewa::Activation>(m, "Activation")
        .value("gelu", ewa::Activation::gelu)
        .value("gelu_tanh", ewa::Activation::gelu_tanh)
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
        [](uintptr_t in, uintptr_t tokens, int64_t n, int64_t d, uintptr_t out) {
            ewa::gather_rows(pointer<const float>(in), pointer<const int64_t>(tokens), n, d, pointer<float>(out));
        },
        unlocked);
    m.def(
        "scatter_rows",
        [](uintptr_t in, uintptr_t bias, uintptr_t tokens, int64_t n, int64_t rows_per_expert, int64_t d,
           uintptr_t out) {
            ewa::scatter_rows(pointer<const float>(in), pointer<const float>(bias), pointer<const int64_t>(tokens), n,
                              rows_per_expert, d, pointer<float>(out));
        },
        unlocked);
    m.def(
        "activate",
        [](ewa::Activation activation, bool gated, int64_t n, int64_t rows_per_expert, int64_t d_ff, uintptr_t scale,
           uintptr_t bias, uintptr_t pre, uintptr_t hidden) {
            ewa::activate(activation, {n, rows_per_expert, d_ff, gated, pointer<const float>(scale)},
                          pointer<const float>(bias), pointer<float>(pre), pointer<float>(hidden));
        },
        unlocked);
    m.def(
        "activate_backward",
        [](ewa::Activation activation, bool gated, int64_t n, int64_t rows_per_expert, int64_t d_ff, uintptr_t scale,
           uintptr_t pre, uintptr_t grad_hidden, uintptr_t grad_pre, uintptr_t hidden, uintptr_t grad_bias,
           float beta) {
            ewa::activate_backward(activation, {n, rows_per_expert, d_ff, gated, pointer<const float>(scale)},
                                   pointer<const float>(pre), pointer<const float>(grad_hidden),
                                   pointer<float>(grad_pre), pointer<float>(hidden), pointer<float>(grad_bias), beta);
        },
        unlocked);
}
