// How the operating system is to provide memory.
#pragma once

#include <cstdint>

namespace ewa {

// Asks for huge pages where they fit into these bytes, before they are first written. A hint: nothing else changes.
void advise_huge_pages(void* memory, int64_t bytes);

}  // namespace ewa
