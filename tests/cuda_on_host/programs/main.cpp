// Lists the programs, or runs one in every mode and for several seeds, and prints what was said on a line for each.
#include <cstdlib>
#include <cstring>

#include "programs.h"

namespace machine = ewa::machine;

int main(int argc, char** argv) {
    const int seeds = argc > 2 ? atoi(argv[2]) : 1;
    for (const auto* list : {&programs::barrier_programs, &programs::warp_programs, &programs::copy_programs,
                             &programs::hand_off_programs, &programs::product_programs, &programs::gemm_programs})
        for (const auto& program : *list) {
            if (argc == 1) printf("%s\n", program.name);
            if (argc == 1 || strcmp(program.name, argv[1]) != 0) continue;
            for (const machine::Mode& mode : machine::modes)
                for (int seed = 1; seed <= seeds; ++seed) {
                    const std::string said = program.run(machine::options_in(mode, static_cast<uint32_t>(seed)));
                    printf("%s: %s\n", mode.name, machine::in_one_line(said).c_str());
                }
        }
}
