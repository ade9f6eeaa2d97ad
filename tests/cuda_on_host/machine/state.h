// What the machine consists of.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "clocks.h"
#include "context.h"

namespace ewa::machine {

using hopper::Major;
using hopper::Operand;

// When what is asynchronous happens: when someone waits for it or nothing else can, at any time, or when it is issued.
enum class When { late, random, at_once };

struct Options {
    uint32_t seed = 1;
    When tma = When::late, wgmma = When::late, cp_async = When::late;
    int ctas_at_once = 4;               // the number of multiprocessors
    int registers = 0;                  // of a thread at launch; 0: as many as there are for its CTA
    uint64_t max_switches = 20000000;  // between fibres
    bool dependent = false;            // launched before the grid before it has ended
};

struct Grid {
    int clusters = 1, cluster_size = 1, threads = 128, shared_bytes = 1024;
};

struct Cta;
struct Cluster;
struct Fibre;
struct Mbarrier;
using Waiters = std::vector<Fibre*>;

// What a fibre waits for, to be said if it waits for ever.
struct Reason {
    const char* what = "";
    int64_t number = -1, detail = -1;
    const Mbarrier* barrier = nullptr;
};

// --- memory ---

// What a thread has written, and no fence has yet shown to the async proxy.
struct Range {
    uint32_t begin, bytes;
    Stamp stamp;
};
struct GlobalRange {
    uintptr_t begin;
    size_t bytes;
    Stamp stamp;
};

// 16 bytes of global memory as TMA still sees those in the mask.
struct Stale {
    uint8_t bytes[16];
    uint32_t mask = 0;
};

// --- barriers ---

struct Mbarrier {
    int arrivals = 0, pending = 0;
    int64_t bytes = 0;  // still expected in this phase
    uint32_t phase = 0;
    Fibre* initialised_by = nullptr;
    Stamp initialised;
    bool fenced = false;  // so that TMA and the peer may use it
    Clock arriving, completed;
    Waiters waiters;
};

struct NamedBarrier {
    int arrived = 0, needed = 0;
    Clock arriving, completed;
    Waiters waiters;
};

struct ClusterBarrier {
    int arrived = 0, ended = 0;
    uint32_t phase = 0;
    Clock arriving, completed;
    Waiters waiters;
};

// --- what is under way ---

struct TensorMap {
    uint8_t* base = nullptr;
    int rank = 2, element_bytes = 2, swizzle = 128;  // 0: none
    int64_t size[3] = {1, 1, 1}, stride[3] = {0, 0, 0};  // strides in bytes
    int box[3] = {1, 1, 1};

    int box_bytes() const { return box[0] * box[1] * box[2] * element_bytes; }
};

struct Load {
    Cta* to_cta;
    uint32_t to, barrier, phase;
    TensorMap map;
    std::array<int, 3> at;
};

struct Store {
    Cta* from_cta;
    TensorMap map;
    uint32_t from;
    std::array<int, 3> at;
    bool has_read = false, is_done = false;
    std::vector<uint8_t> data;
};

struct StoreGroup {
    std::vector<Store> stores;
    bool waited_read = false;
};

struct Copy {
    enum Kind { bytes, commit, arrive } kind;
    uint32_t to;  // or the barrier
    const void* from;
    uint32_t size;
};

// A wgmma of one warp. What all four warps of the warpgroup must agree on is in `Shape`.
struct Shape {
    int n;
    Operand type;
    Major major_a, major_b;
    uint64_t a, b;
    bool accumulate;

    bool operator==(const Shape& other) const {
        return n == other.n && type == other.type && major_a == other.major_a && major_b == other.major_b &&
               a == other.a && b == other.b && accumulate == other.accumulate;
    }
};

// The true values of accumulators in flight, while threads see NaN.
struct Accumulators {
    std::array<float*, 32> seen;
    int in_flight = 0;
    int registers;
    std::vector<float> values;  // [32][registers]
};

struct Product {
    Shape shape;
    uint64_t group;
    Accumulators* to;
};

// --- threads ---

// Chunks of 16 bytes that products of a group read.
struct OperandReads {
    uint64_t group;
    std::vector<uint32_t> chunks;
};

struct Warp {
    // An instruction that lanes execute together.
    const char* instruction = nullptr;
    int arrived = 0, ended = 0;
    uint32_t in[32][5], out[32][4];
    float* accumulators[32];
    Waiters waiters;

    bool fenced = false;  // by wgmma.fence
    uint64_t group = 0;   // the one that is open
    std::deque<Product> products;
    std::deque<OperandReads> operand_reads;  // not yet waited for
    std::vector<std::unique_ptr<Accumulators>> accumulators_in_flight;

    Stamp now;  // its number, and the epoch that it is in

    int registers = 0;
    size_t shapes = 0, changes = 0;  // how far in its warpgroup's
};

struct Warpgroup {
    std::vector<Shape> shapes;  // of all wgmma so far, which each warp repeats
    std::vector<int> changes;   // of registers
};

struct RegisterRequest {
    Warp* warp;
    int registers;
    Waiters waiters;
};

struct Fibre {
    Context context;
    int thread = 0;
    Cta* cta = nullptr;
    bool done = false, has_waited_for_grids = false;
    Reason reason;

    Clock knows;
    std::vector<Range> written;
    std::vector<GlobalRange> written_global;
    std::vector<Mbarrier*> initialised;
    std::deque<Copy> copies;
    std::deque<StoreGroup> store_groups;
    StoreGroup open_stores;
    bool cluster_arrived = false;
    uint32_t cluster_phase = 0;
    const uint32_t* polled = nullptr;  // and with what result
    uint32_t polled_value = 0;

    int lane() const { return thread % 32; }
};

struct Cta {
    Cluster* cluster = nullptr;
    int rank = 0, running = 0;
    std::vector<uint8_t> generic, async;  // shared memory as the two proxies see it
    // Of each 4 bytes: who wrote them last, if that was a thread; the warps that have read them since, and when; how
    // many TMA stores and wgmma that read them were not yet waited for.
    std::vector<Stamp> writers;
    std::vector<uint32_t> readers, read_epochs;
    std::vector<uint16_t> async_reads;
    std::unordered_map<uint32_t, Mbarrier> mbarriers;
    std::array<NamedBarrier, 16> named;
    std::vector<Warp> warps;
    std::vector<Warpgroup> warpgroups;
    std::vector<Fibre*> fibres;
    int loads_in_flight = 0;
    int free_registers = 0;  // of a thread, for one warp
    std::deque<RegisterRequest> register_requests;
};

struct Cluster {
    int id = 0;
    std::vector<std::unique_ptr<Cta>> ctas;
    ClusterBarrier barrier;
    bool alive = false;
};

struct Machine {
    Options options;
    Grid grid;
    std::function<void()> kernel;
    std::mt19937 random;
    std::string error;

    Context scheduler;
    Fibre* current = nullptr;
    uint64_t switches = 0;
    uint64_t progress = 0;  // grows with all that may end a spin
    Waiters ready, spinning;
    int elected = 0;  // the lane

    std::vector<std::unique_ptr<Cluster>> clusters;
    int next_cluster = 0;

    std::vector<Load> loads;
    std::vector<Fibre*> copying;
    std::vector<Store> read_stores;  // of CTAs that have ended
    std::unordered_map<uintptr_t, Stale> stale;
    std::vector<GlobalRange> written_global;  // by threads that have ended
    std::unordered_map<uintptr_t, Stamp> global_writers;  // of 4 bytes
    std::unordered_map<const uint32_t*, Clock> flags;
};

inline Machine state;

}  // namespace ewa::machine
