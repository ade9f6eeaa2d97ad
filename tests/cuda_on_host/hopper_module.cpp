// What ewa_kernels._C has of csrc/hopper, in the model of the machine. `set_machine`: see hopper_layer.cpp.
#include <pybind11/pybind11.h>

#include <string>

#include "hopper/bindings.h"

extern "C" void set_machine(uint32_t seed, const char* mode, int multiprocessors);

PYBIND11_MODULE(hopper_on_host, m) {
    ewa::hopper::bind(m);
    m.def("set_machine", [](uint32_t seed, const std::string& mode, int multiprocessors) {
        set_machine(seed, mode.c_str(), multiprocessors);
    });
}
