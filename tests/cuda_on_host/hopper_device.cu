// Some of the kernels that layer.cuh launches, for tests/test_hopper_device.py to see what the compiler makes of them.
#include "hopper/layer.cuh"

namespace ewa::hopper {

constexpr Operand type = Operand::bf16;

// Each `Product` asserts that it keeps within the limit; this is what a CTA can have on sm_90: 227 KiB.
static_assert(shared_limit == 227 * 1024);

struct Launches {
    decltype(&up<type, Gelu, false, false>) up_of[3];
    decltype(&down_projection_of<type>) down;
};

Launches launches() {
    return {{up<type, Gelu, false, false>, up<type, Silu, true, false>, up<type, Gelu, false, true>},
            down_projection_of<type>};
}

}  // namespace ewa::hopper
