// csrc/hopper/layer.h for Python, in the model of the machine. tests/test_hopper.py has the structure's fields.
#include "hopper/layer.h"

#include "hopper/launch.cuh"

namespace {

using ewa::machine::When;

std::string said;

const char* say(std::string what) {
    said = std::move(what);
    return said.c_str();
}

}  // namespace

extern "C" {

void set_machine(uint32_t seed, int copies, int products, int multiprocessors) {
    ewa::hopper::options_of_launches = {};
    ewa::hopper::options_of_launches.seed = seed;
    ewa::hopper::options_of_launches.tma = ewa::hopper::options_of_launches.cp_async = static_cast<When>(copies);
    ewa::hopper::options_of_launches.wgmma = static_cast<When>(products);
    ewa::hopper::multiprocessors_of_launches = multiprocessors;
}

const char* up_projection(const ewa::hopper::Layer* layer, const void* x, const void* up_weight, const void* bias,
                          int bias_type, void* hidden, void* pre_activation) {
    return say(ewa::hopper::up_projection(*layer, x, up_weight, {bias, bias_type}, hidden, pre_activation));
}

const char* down_projection(const ewa::hopper::Layer* layer, const void* hidden, const void* down_weight,
                            const void* bias, int bias_type, const int32_t* permutation, void* y) {
    return say(ewa::hopper::down_projection(*layer, hidden, down_weight, {bias, bias_type}, permutation, y));
}

}  // extern "C"
