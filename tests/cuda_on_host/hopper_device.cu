// Some of the kernels that layer.cuh launches, for tests/test_hopper_device.py to see what the compiler makes of them.
#include "hopper/layer.cuh"

namespace ewa::hopper {

// Each `Product` asserts that it keeps within the limit; this is what a CTA can have on sm_90: 227 KiB.
static_assert(shared_limit == 227 * 1024);

using Launch = std::string (*)(const Layer&, const Operands&);
using Of = Products<Operand::bf16>;

// By `volatile`, so that none is left out.
volatile Launch launches[] = {
    Of::Up<Gelu, false, false, false>::run,
    Of::Up<Silu, true, false, false>::run,
    Of::Up<Gelu, false, true, false>::run,
    Of::Up<Gelu, false, false, true>::run,
    Of::grad_pre<Gelu, false, false>,
    Of::grad_pre<Silu, true, false>,
    Of::grad_pre<Gelu, true, true>,
    Of::weight,
};
volatile auto both = Of::Up<Gelu, false, false, true, true>::run_with_down;
volatile auto down = Of::Scattered<Major::k>::run;
volatile auto grad_x = Of::Scattered<Major::mn>::run;

}  // namespace ewa::hopper
