#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace ewa {

// Python gives addresses as numbers.
template <class T = void>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace ewa

namespace ewa::hopper {

// Into ewa_kernels._C, where it is built for Hopper; or into a module of the tests, for the model of the machine.
void bind(pybind11::module_& m);

}  // namespace ewa::hopper
