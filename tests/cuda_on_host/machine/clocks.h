// Who knows of what: vector clocks with a component for each warp that is alive.
//
// A warp's epoch grows each time that one of its lanes arrives anywhere. What a lane writes is stamped with the epoch;
// an arrival hands on all that the thread knows and all that its warp has written so far; who waits there learns it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace ewa::machine {

struct Stamp {
    uint32_t warp = 0, epoch = 0;  // the warp's number in the machine
};

struct Clock {
    std::vector<uint32_t> epochs;

    uint32_t at(uint32_t warp) const { return warp < epochs.size() ? epochs[warp] : 0; }
    void learn(const Clock& other) {
        if (epochs.size() < other.epochs.size()) epochs.resize(other.epochs.size());
        for (size_t i = 0; i < other.epochs.size(); ++i) epochs[i] = std::max(epochs[i], other.epochs[i]);
    }
    void learn(Stamp stamp) {
        if (epochs.size() <= stamp.warp) epochs.resize(stamp.warp + 1);
        epochs[stamp.warp] = std::max(epochs[stamp.warp], stamp.epoch);
    }
};

}  // namespace ewa::machine
