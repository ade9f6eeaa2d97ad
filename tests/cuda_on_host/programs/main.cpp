// Lists the programs, or runs one in every mode and for several seeds, and prints what was said on a line for each.
#include <cstdlib>
#include <cstring>

#include "programs.h"

namespace machine = ewa::machine;

struct Mode {
    const char* name;
    machine::When copies, products;
};
constexpr Mode modes[] = {
    {"late", machine::When::late, machine::When::late},
    {"random", machine::When::random, machine::When::random},
    {"at_once", machine::When::at_once, machine::When::at_once},
    {"late_products", machine::When::at_once, machine::When::late},
};

int main(int argc, char** argv) {
    const int seeds = argc > 2 ? atoi(argv[2]) : 1;
    for (const auto* list : {&programs::barrier_programs, &programs::warp_programs, &programs::copy_programs,
                             &programs::hand_off_programs, &programs::product_programs, &programs::gemm_programs})
        for (const auto& program : *list) {
            if (argc == 1) printf("%s\n", program.name);
            if (argc == 1 || strcmp(program.name, argv[1]) != 0) continue;
            for (const Mode& mode : modes)
                for (int seed = 1; seed <= seeds; ++seed) {
                    machine::Options options;
                    options.seed = static_cast<uint32_t>(seed);
                    options.tma = options.cp_async = mode.copies;
                    options.wgmma = mode.products;
                    std::string said = program.run(options);
                    for (char& c : said)
                        if (c == '\n') c = ';';
                    printf("%s: %s\n", mode.name, said.c_str());
                }
        }
}
