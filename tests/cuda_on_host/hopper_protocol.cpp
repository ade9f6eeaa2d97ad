// The barriers of csrc/hopper/product.cuh by themselves, in every order that things may happen in.
//
// Two CTAs of a cluster, each with a producer and two warpgroups of consumers, are lists of operations; loads land when
// they like. A warpgroup is one reader here, for its warps do the same. All states that can be reached are visited, but
// two things happen at once, since nobody can tell when they did: a load that neither completes a phase nor meets a
// reader lands, and an arrival at a named barrier is made. With `--all`, they too may happen at any time.
//
// Settings are read line by line: stages tiles steps cooperative|pingpong [fault].
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace {

constexpr int max_stages = 4;

struct Setting {
    int stages = 2, tiles = 1, steps = 1;
    bool pingpong = false, everything = false;
    std::string fault;

    bool has(const char* name) const { return fault == name; }
};

// --- programs of the agents ---

enum class Kind {
    fill,             // waits until a stage is empty, expects its bytes, loads
    drain,            // waits until a stage is empty
    read,             // waits until a stage is full; its products begin
    end_of_products,  // of a stage
    release_own,
    release_peer,
    turn_arrive,
    turn_sync,  // arrives, and then
    turn_wait,  // until all have
};

struct Op {
    Kind kind;
    int number;  // step, or named barrier
};

enum Turn { to_multiply = 0, to_store = 2 };  // + the group whose turn it is

struct Program {
    std::vector<Op> ops;
    // Before each operation: steps of which products run, and whether it is the group's turn.
    std::vector<std::vector<int>> reads;
    std::vector<bool> multiplies, stores;
};

Program producer(const Setting& setting, int cta) {
    Program p;
    const bool sits_out = setting.has("a CTA sits out the last tile") && cta == 1;
    const int steps = (setting.tiles - sits_out) * setting.steps;
    for (int i = 0; i < steps; ++i) p.ops.push_back({Kind::fill, i});
    const int stages = setting.has("no drain") ? 0 : setting.stages - setting.has("drain of all stages but one");
    for (int i = steps; i < steps + stages; ++i) p.ops.push_back({Kind::drain, i});
    return p;
}

Program consumer(const Setting& setting, int cta, int group) {
    Program p;
    bool multiplies = false, stores = false;
    std::vector<int> reads;
    const auto add = [&](Kind kind, int number) {
        p.ops.push_back({kind, number});
        p.reads.push_back(reads);
        p.multiplies.push_back(multiplies);
        p.stores.push_back(stores);
        if (kind == Kind::read) reads.push_back(number);
        if (kind == Kind::end_of_products)
            for (size_t i = 0; i < reads.size(); ++i)
                if (reads[i] == number) reads.erase(reads.begin() + static_cast<long>(i));
    };
    const auto end = [&](int step) { add(Kind::end_of_products, step); };
    const auto release = [&](int step) {
        add(Kind::release_own, step);
        if (!setting.has("releases on the own CTA only")) add(Kind::release_peer, step);
    };
    const auto take = [&](Turn turn, bool& mine) {
        if (!setting.has("no turns")) {
            add(Kind::turn_sync, turn + group);
            add(Kind::turn_wait, turn + group);
        }
        mine = true;
    };
    const auto give = [&](Turn turn, bool& mine) {
        mine = false;
        if (!setting.has("no turns")) add(Kind::turn_arrive, turn + 1 - group);
    };
    if (setting.pingpong && group == 1 && !setting.has("first turns are nobody's")) {
        give(to_multiply, multiplies);
        give(to_store, stores);
    }
    const bool early = setting.has("releases before its products");
    const bool sits_out = setting.has("a CTA sits out the last tile") && cta == 1;
    int turn = 0;
    for (int tile = 0; tile < setting.tiles - sits_out; ++tile) {
        if (setting.pingpong && turn++ % 2 != group) continue;
        if (setting.pingpong) take(to_multiply, multiplies);
        const int first = tile * setting.steps, last = first + setting.steps - 1;
        for (int step = first; step <= last; ++step) {
            add(Kind::read, step);
            if (early) release(step);
            if (step == first) continue;
            end(step - 1);
            if (!early) release(step - 1);
        }
        if (setting.pingpong) give(to_multiply, multiplies);
        end(last);
        if (!early && !setting.has("last stage is not released")) release(last);
        if (setting.pingpong) {
            take(to_store, stores);
            give(to_store, stores);
        }
    }
    if (setting.pingpong && turn % 2 == group && !setting.has("no last turns")) {
        take(to_multiply, multiplies);
        multiplies = false;
        take(to_store, stores);
        stores = false;
    }
    p.reads.push_back(reads);
    p.multiplies.push_back(multiplies);
    p.stores.push_back(stores);
    return p;
}

// --- states ---

constexpr int8_t nothing = -1;
constexpr int own = 0, from_peer = 1;       // parts of a stage: A and the own half of B, and the peer's half
constexpr int bytes_of[2] = {3, 1};         // in halves of B
constexpr int producer_of = 0, groups = 2;  // agent 0 of a CTA; agents 1 and 2 are its consumers

struct Barrier {
    int8_t pending, bytes, phase;  // phase: its parity
};

struct Stage {
    Barrier full, empty;
    int8_t holds[2], loading[2];  // steps, of each part
};

struct Cta {
    uint8_t at[1 + groups];  // of the agents' programs
    uint8_t arrived[4];      // groups at each named barrier
    Stage stages[max_stages];
};

struct State {
    Cta ctas[2];
};
static_assert(sizeof(State) == 2 * (7 + max_stages * 10), "no padding: states are compared as bytes");

// States that have been visited, by 128 bits of hash: that two of some millions agree in it is out of the question.
class Visited {
public:
    Visited() : table(1 << 12) {}

    size_t size() const { return number; }

    bool insert(const State& state) {
        if (2 * number > table.size()) grow();
        const bool is_new = put(key_of(state));
        number += is_new;
        return is_new;
    }

private:
    struct Key {
        uint64_t first = 0, second = 0;
    };
    std::vector<Key> table;
    size_t number = 0;

    static Key key_of(const State& state) {
        uint64_t words[(sizeof(State) + 7) / 8] = {};
        memcpy(words, &state, sizeof(State));
        Key key{1, 2};
        for (uint64_t word : words) {
            key.first = (key.first ^ word) * 0x9E3779B97F4A7C15ull;
            key.first ^= key.first >> 29;
            key.second = (key.second + word) * 0xD6E8FEB86659FD93ull;
            key.second ^= key.second >> 32;
        }
        key.first |= 1;  // 0: free
        return key;
    }
    bool put(const Key& key) {
        size_t i = key.second & (table.size() - 1);
        for (; table[i].first != 0; i = (i + 1) & (table.size() - 1))
            if (table[i].first == key.first && table[i].second == key.second) return false;
        table[i] = key;
        return true;
    }
    void grow() {
        std::vector<Key> old(4 * table.size());
        old.swap(table);
        for (const Key& key : old)
            if (key.first != 0) put(key);
    }
};

struct Search {
    Setting setting;
    std::array<std::array<Program, 1 + groups>, 2> programs;
    int readers;
    std::string error;
    Visited seen;
    std::vector<State> stack;

    explicit Search(const Setting& s) : setting(s) {
        for (int cta = 0; cta < 2; ++cta) {
            programs[cta][producer_of] = producer(s, cta);
            for (int group = 0; group < groups; ++group) programs[cta][1 + group] = consumer(s, cta, group);
        }
        readers = s.pingpong ? 2 : 4;
        if (s.has("releases on the own CTA only")) readers /= 2;
        if (s.has("twice as many readers")) readers *= 2;
    }

    void fail(const char* what) {
        if (error.empty()) error = what;
    }

    bool done(const State& s, int cta, int agent) const {
        return s.ctas[cta].at[agent] == programs[cta][agent].ops.size();
    }
    bool ended(const State& s, int cta) const { return done(s, cta, 0) && done(s, cta, 1) && done(s, cta, 2); }

    void complete_if(Barrier& barrier, int arrivals) {
        if (barrier.pending < 0) fail("more arrivals than the phase has");
        if (barrier.pending > 0 || barrier.bytes != 0) return;
        barrier.phase ^= 1;
        barrier.pending = static_cast<int8_t>(arrivals);
    }
    int parity(int step) const { return step / setting.stages & 1; }
    static bool is_over(const Barrier& barrier, int parity) { return barrier.phase != parity; }

    bool is_read(const State& s, int cta, int stage) const {
        for (int agent = 1; agent <= groups; ++agent)
            for (int step : programs[cta][agent].reads[s.ctas[cta].at[agent]])
                if (step % setting.stages == stage) return true;
        return false;
    }

    void issue(State& s, int cta, int part, int step) {
        if (ended(s, cta)) fail("load to a CTA that has ended");
        int8_t& loading = s.ctas[cta].stages[step % setting.stages].loading[part];
        if (loading != nothing) fail("two loads to one place");
        loading = static_cast<int8_t>(step);
    }
    void land(State& s, int cta, int stage, int part) {
        Stage& to = s.ctas[cta].stages[stage];
        if (ended(s, cta)) fail("load to a CTA that has ended");
        if (is_read(s, cta, stage)) fail("overwritten while it is read");
        to.holds[part] = to.loading[part];
        to.loading[part] = nothing;
        to.full.bytes = static_cast<int8_t>(to.full.bytes - bytes_of[part]);
        complete_if(to.full, 1);
    }
    void release(State& s, int cta, int step) {
        if (ended(s, cta)) fail("arrival at a CTA that has ended");
        Barrier& empty = s.ctas[cta].stages[step % setting.stages].empty;
        --empty.pending;
        complete_if(empty, readers);
    }
    void arrive(State& s, int cta, int group, int turn) {
        Cta& c = s.ctas[cta];
        if (c.arrived[turn] >> group & 1) fail("arrives twice at a named barrier");
        c.arrived[turn] = static_cast<uint8_t>(c.arrived[turn] | 1 << group);
        if (c.arrived[turn] != 3) return;
        c.arrived[turn] = 0;
        for (int agent = 1; agent <= groups; ++agent) {
            const auto& ops = programs[cta][agent].ops;
            const size_t at = c.at[agent];
            if (at < ops.size() && ops[at].kind == Kind::turn_wait && ops[at].number == turn) ++c.at[agent];
        }
    }

    // Whether the agent can go on, and then what becomes of the state.
    bool step(State& s, int cta, int agent) {
        if (done(s, cta, agent)) return false;
        Cta& c = s.ctas[cta];
        const Op op = programs[cta][agent].ops[c.at[agent]];
        Stage& stage = c.stages[op.number % setting.stages];
        const int wrong = setting.has("wrong parity in the producer"), group = agent - 1;
        switch (op.kind) {
            case Kind::turn_wait:
                return false;
            case Kind::fill:
            case Kind::drain:
                if (!is_over(stage.empty, parity(op.number) ^ 1 ^ wrong)) return false;
                break;
            case Kind::read:
                if (!is_over(stage.full, parity(op.number))) return false;
                break;
            default:
                break;
        }
        ++c.at[agent];
        switch (op.kind) {
            case Kind::fill:
                --stage.full.pending;
                stage.full.bytes = static_cast<int8_t>(
                    stage.full.bytes + (setting.has("expects its own bytes only") ? bytes_of[own] : 4));
                complete_if(stage.full, 1);
                issue(s, cta, own, op.number);
                if (!setting.has("sends B to itself only")) issue(s, 1 - cta, from_peer, op.number);
                break;
            case Kind::read:
                for (int part : {own, from_peer})
                    if (stage.holds[part] != op.number) fail("reads what is not there yet, or no more");
                break;
            case Kind::end_of_products:  // nobody sees it: on to what tells of it
                if (!done(s, cta, agent)) return step(s, cta, agent) || true;
                break;
            case Kind::release_own:
                release(s, cta, op.number);
                break;
            case Kind::release_peer:
                release(s, 1 - cta, op.number);
                break;
            case Kind::turn_arrive:
            case Kind::turn_sync:
                arrive(s, cta, group, op.number);
                break;
            default:
                break;
        }
        return true;
    }

    void check(const State& s) {
        for (int cta = 0; cta < 2; ++cta) {
            const Cta& c = s.ctas[cta];
            const auto &first = programs[cta][1], &second = programs[cta][2];
            if (first.multiplies[c.at[1]] && second.multiplies[c.at[2]]) fail("both multiply");
            if (first.stores[c.at[1]] && second.stores[c.at[2]]) fail("both store");
            if (!ended(s, cta)) continue;
            for (int turn = 0; turn < 4; ++turn)
                if (c.arrived[turn] != 0) fail("ends with an arrival at a named barrier that nobody waits for");
            for (int i = 0; i < setting.stages; ++i)
                if (c.stages[i].loading[own] != nothing || c.stages[i].loading[from_peer] != nothing)
                    fail("ends while loads to it are in flight");
        }
    }

    void visit(const State& s) {
        check(s);
        if (error.empty() && seen.insert(s)) stack.push_back(s);
    }

    bool lands_unseen(const State& s, int cta, int stage, int part) const {
        const Barrier& full = s.ctas[cta].stages[stage].full;
        return !setting.everything && !ended(s, cta) && !is_read(s, cta, stage) &&
               (full.pending > 0 || full.bytes > bytes_of[part]);
    }

    void go_on_from(const State& s) {
        for (int cta = 0; cta < 2; ++cta)
            for (int stage = 0; stage < setting.stages; ++stage)
                for (int part : {own, from_peer})
                    if (s.ctas[cta].stages[stage].loading[part] != nothing && lands_unseen(s, cta, stage, part)) {
                        State next = s;
                        land(next, cta, stage, part);
                        return visit(next);
                    }
        for (int cta = 0; cta < 2 && !setting.everything; ++cta)
            for (int agent = 1; agent <= groups; ++agent) {
                if (done(s, cta, agent)) continue;
                const Kind kind = programs[cta][agent].ops[s.ctas[cta].at[agent]].kind;
                if (kind != Kind::turn_arrive && kind != Kind::turn_sync) continue;
                State next = s;
                step(next, cta, agent);
                return visit(next);
            }
        bool something = false;
        for (int cta = 0; cta < 2; ++cta) {
            for (int stage = 0; stage < setting.stages; ++stage)
                for (int part : {own, from_peer})
                    if (s.ctas[cta].stages[stage].loading[part] != nothing) {
                        State next = s;
                        land(next, cta, stage, part);
                        visit(next);
                        something = true;
                    }
            for (int agent = 0; agent <= groups; ++agent) {
                State next = s;
                if (!step(next, cta, agent)) continue;
                visit(next);
                something = true;
            }
        }
        if (!something && !(ended(s, 0) && ended(s, 1))) fail("deadlock");
    }

    // What is wrong, or nothing.
    std::string run() {
        State s;
        memset(&s, 0, sizeof s);
        for (Cta& cta : s.ctas)
            for (Stage& stage : cta.stages)
                stage = {{1, 0, 0}, {static_cast<int8_t>(readers), 0, 0}, {nothing, nothing}, {nothing, nothing}};
        visit(s);
        while (!stack.empty() && error.empty()) {
            const State next = stack.back();
            stack.pop_back();
            go_on_from(next);
        }
        return error;
    }
};

}  // namespace

int main(int argc, char** argv) {
    const bool everything = argc > 1 && strcmp(argv[1], "--all") == 0;
    char form[32], fault[128];
    Setting setting;
    char line[256];
    while (fgets(line, sizeof line, stdin) != nullptr) {
        fault[0] = 0;
        if (sscanf(line, "%d %d %d %31s %127[^\n]", &setting.stages, &setting.tiles, &setting.steps, form, fault) < 4 ||
            setting.stages > max_stages)
            return 1;
        setting.pingpong = strcmp(form, "pingpong") == 0;
        setting.everything = everything;
        setting.fault = fault;
        Search search(setting);
        const std::string said = search.run();
        printf("%zu states: %s\n", search.seen.size(), said.c_str());
        fflush(stdout);
    }
}
