// The part of CUDA's runtime that csrc/hopper calls, doing nothing: what a launch costs before the driver has it.
// benchmarks/launches.py links it with what nvcc has made of csrc/hopper.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>

#include "hopper/bindings.h"

namespace {

int64_t launches = 0;

// As cuTensorMapEncodeTiled: a map is 128 bytes.
int encode(void* map, int, uint32_t, void*, const uint64_t*, const uint64_t*, const uint32_t*, const uint32_t*, int, int,
           int, int) {
    memset(map, 1, 128);
    return 0;
}

int current_context(void** context) {
    *context = context;
    return 0;
}

}  // namespace

extern "C" {

int cudaGetDevice(int* device) { return *device = 0; }
int cudaSetDevice(int) { return 0; }
int cudaFuncSetAttribute(const void*, int, int) { return 0; }
const char* cudaGetErrorString(int) { return "none"; }
int cudaOccupancyMaxActiveClusters(int* clusters, const void*, const void*) {
    *clusters = 66;
    return 0;
}
int cudaGetDriverEntryPointByVersion(const char* name, void** entry, unsigned, unsigned long long, int* result) {
    *entry = strcmp(name, "cuCtxGetCurrent") == 0 ? reinterpret_cast<void*>(current_context)
                                                  : reinterpret_cast<void*>(encode);
    *result = 0;
    return 0;
}
int cudaLaunchKernelExC(const void*, const void*, void**) {
    ++launches;
    return 0;
}

// What nvcc's own code calls when the module is loaded, and for launches that nobody makes.
void** __cudaRegisterFatBinary(void*) {
    static void* handle;
    return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char*, char*, const char*, int, void*, void*, void*, void*, int*) {}
int __cudaGetKernel(void**, const void*) { return 0; }
int __cudaLaunchKernel(const void*) { return 0; }
unsigned __cudaPopCallConfiguration(void*, void*, size_t*, void*) { return 0; }

}  // extern "C"

PYBIND11_MODULE(hopper_without_driver, m) {
    ewa::hopper::bind(m);
    m.def("launches", [] { return launches; });
}
