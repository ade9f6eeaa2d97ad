// Threads as fibres: one runs until it waits.
#pragma once

#include "state.h"

namespace ewa::machine {

inline std::string place(const Cta& cta) {
    return "cluster " + std::to_string(cta.cluster->id) + " CTA " + std::to_string(cta.rank);
}

inline Fibre& self() { return *state.current; }
inline Cta& own_cta() { return *self().cta; }
inline Warp& own_warp() { return own_cta().warps[self().thread / 32]; }

__attribute__((noinline)) inline void leave() {
    ++state.switches;
    state.current->context.go_to(state.scheduler);
}

// The first error ends the launch: a thread that finds one does not go on. The scheduler does, up to its next step.
inline void fail(std::string what) {
    if (state.error.empty()) {
        state.error = std::move(what);
        if (state.current != nullptr)
            state.error += " (" + place(own_cta()) + " thread " + std::to_string(self().thread) + ")";
    }
    if (state.current != nullptr) leave();
}

inline void block(Waiters& waiters, Reason reason) {
    self().reason = reason;
    waiters.push_back(state.current);
    leave();
    self().reason = {};
}

inline void make_ready(Waiters& waiters) {
    state.ready.insert(state.ready.end(), waiters.begin(), waiters.end());
    waiters.clear();
}

inline void wake(Waiters& waiters) {
    ++state.progress;
    make_ready(waiters);
}

// Lets others go first, now and then.
inline void preempt() {
    if (state.random() % 8 != 0) return;
    state.ready.push_back(state.current);
    leave();
}

// Of a loop that polls: goes on when something has happened, or when nothing else can.
inline void spin(Reason reason) { block(state.spinning, reason); }

inline bool by_chance(When when) { return when == When::at_once || (when == When::random && state.random() % 2 == 0); }

}  // namespace ewa::machine
