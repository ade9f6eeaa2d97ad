// csrc/hopper/layer.h for Python, in the model of the machine. tests/test_hopper.py has the structures' fields.
#include "hopper/layer.h"

#include "hopper/launch.cuh"
#include "trials.h"

namespace {

std::string said;

const char* say(std::string what) {
    said = std::move(what);
    return said.c_str();
}

}  // namespace

extern "C" {

// `mode`: the name of one.
void set_machine(uint32_t seed, const char* mode, int multiprocessors) {
    ewa::hopper::options_of_launches = ewa::machine::options_in(*ewa::machine::mode_named(mode), seed);
    ewa::hopper::multiprocessors_of_launches = multiprocessors;
}

const char* run(int call, const ewa::hopper::Layer* layer, const ewa::hopper::Operands* operands) {
    return say(ewa::hopper::run(static_cast<ewa::hopper::Call>(call), *layer, *operands));
}

const char* forward(const ewa::hopper::Layer* layer, const ewa::hopper::Operands* up,
                    const ewa::hopper::Operands* down, uint32_t* flags) {
    return say(ewa::hopper::forward(*layer, *up, *down, flags));
}

int num_flags(const ewa::hopper::Layer* layer) { return layer->num_flags(); }

const char* gather(const ewa::hopper::Layer* layer, const ewa::hopper::Rows* rows,
                   const ewa::hopper::Gathered* gathered) {
    return say(ewa::hopper::gather(*layer, *rows, *gathered));
}

const char* tabulate(const ewa::hopper::Layer* layer, const int32_t* expert_offsets, int32_t* table) {
    return say(ewa::hopper::tabulate(*layer, expert_offsets, table));
}

int slots_of(const ewa::hopper::Layer* layer) { return layer->slots(); }

int64_t table_size(const ewa::hopper::Layer* layer) { return layer->table_size(); }

int splits_of(const ewa::hopper::Layer* layer, int size_m, int size_n) {
    return ewa::hopper::splits_of(*layer, size_m, size_n);
}

}  // extern "C"
