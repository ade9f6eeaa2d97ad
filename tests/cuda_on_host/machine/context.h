// A stack, and switching to it.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdlib>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace ewa::machine {

constexpr size_t stack_bytes = 256 << 10;
constexpr size_t page_bytes = 64 << 10;  // at least

// Below the stack lies a page that may not be touched.
inline char* new_stack() {
    void* memory = mmap(nullptr, stack_bytes + page_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) abort();
    mprotect(memory, page_bytes, PROT_NONE);
    return static_cast<char*>(memory) + page_bytes;
}

}  // namespace ewa::machine

#ifdef __x86_64__

// Saves what a call must preserve on the stack, and the stack pointer to *save; continues what was saved at `load`.
extern "C" void ewa_machine_switch(void** save, void* load);
asm(R"(
.text
.weak ewa_machine_switch
.type ewa_machine_switch, @function
ewa_machine_switch:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
)");

namespace ewa::machine {

struct Context {
    char* stack = nullptr;
    void* stack_pointer = nullptr;

    void start(void (*function)()) {
        if (stack == nullptr) stack = new_stack();
        void** top = reinterpret_cast<void**>(stack + stack_bytes - 64);
        *--top = nullptr;  // where `function` would return to; it does not
        *--top = reinterpret_cast<void*>(function);
        for (int i = 0; i < 6; ++i) *--top = nullptr;
        stack_pointer = top;
    }
    void go_to(Context& other) { ewa_machine_switch(&stack_pointer, other.stack_pointer); }
};

}  // namespace ewa::machine

#else

namespace ewa::machine {

struct Context {
    char* stack = nullptr;
    ucontext_t saved;

    void start(void (*function)()) {
        if (stack == nullptr) stack = new_stack();
        getcontext(&saved);
        saved.uc_stack.ss_sp = stack;
        saved.uc_stack.ss_size = stack_bytes;
        saved.uc_link = nullptr;
        makecontext(&saved, function, 0);
    }
    void go_to(Context& other) { swapcontext(&saved, &other.saved); }
};

}  // namespace ewa::machine

#endif
