// Some of the kernels that layer.cuh launches, for tests/test_hopper_device.py to see what the compiler makes of them.
#include "hopper/layer.cuh"

namespace ewa::hopper {

// Each `Product` asserts that it keeps within the limit; this is what a CTA can have on sm_90: 227 KiB.
static_assert(shared_limit == 227 * 1024);

using Launch = std::string (*)(const Layer&, const Operands&);
using Of = Products<Operand::bf16>;

// By `volatile`, so that none is left out.
volatile Launch launches[] = {
    Of::up<Gelu, false, false, false>, Of::up<Silu, true, false, false>, Of::up<Gelu, false, true, false>,
    Of::up<Gelu, false, false, true>,  Of::grad_pre<Gelu, false, false>, Of::grad_pre<Silu, true, false>,
    Of::weight,
};
volatile auto down = Of::scattered<Major::k>;
volatile auto grad_x = Of::scattered<Major::mn>;

}  // namespace ewa::hopper
