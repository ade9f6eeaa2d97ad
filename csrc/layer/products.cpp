#include "products.h"

#include <algorithm>
#include <cstdint>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "packing.h"

#ifdef EWA_AVX512
#include <cpuid.h>
#endif

namespace ewa {

int64_t max_threads() {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

#ifdef EWA_AVX512
namespace {

// So many at least, so that threads of unequal speed end at about the same time: another program may use a core too. Each
// reads all of the right operand that is packed.
constexpr int64_t tasks_per_thread = 2;
// Of so many the last ones are halved. Halves of a few large tasks would cost more than they gain.
constexpr int64_t many_tasks_per_thread = 4;
// Of the right operand so much is packed at a time: of several experts 2.5 MB for each thread, about its share of the
// third cache, but no more than 64 MB; of one 8 MB. If that has more, its sum is made in several batches.
constexpr int64_t right_words_per_thread = int64_t{5} << 17, most_right_words = int64_t{1} << 24;
constexpr int64_t right_words_of_one = int64_t{1} << 21;
// Of the left operand and the result so much for each thread, where a task is all of an expert.
constexpr int64_t most_words_of_task = int64_t{1} << 21;

int64_t this_thread() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

struct Range {
    int64_t first, end;
};

// out = the product's parts in a range, or is added to it. `left` is packed from the first of them on; `right_of` gives
// the address of the right operand's packed columns block … of a part, `ahead_of` the memory that it will read for it.
template <bool bfloat16, class RightOf, class AheadOf>
void multiply_panels(const Product& product, const Parts& rows, const Range& parts, const float* left, bool add, float* out,
                     const RightOf& right_of, const AheadOf& ahead_of) {
    const Parts words = product.parts();
    for (int64_t block = 0; block < product.n; block += block_columns)
        for (int64_t part = parts.first; part < parts.end; ++part) {
            const int64_t word = words.start(part) - words.start(parts.first), n = words.size(part);
            const float* const right = right_of(part, block);
            Ahead ahead = part + 1 < parts.end ? ahead_of(part + 1, block) : ahead_of(parts.first, block + block_columns);
            for (int64_t i = 0; i < rows.count; ++i) {
                const float* panel = left + rows.total * word + rows.start(i) * n;
                for (int64_t j = block; j < std::min(block + block_columns, product.n); j += tile_columns)
                    tiles<bfloat16>[rows.size(i) - 1](n, panel, right + (j - block) * n,
                                                      out + rows.start(i) * product.n + j, product.n, product.n - j,
                                                      add || part > parts.first, ahead);
            }
        }
}

struct PackTask {
    int64_t expert, at, part, column;
};
struct RowsTask {
    int64_t expert, at, first, rows;
};

// How right operands are packed: by each task for itself, a block at a time; for all tasks, before them; or so too, but of
// one expert, and some parts of its sum at a time.
enum class Packed { by_tasks, for_all, in_parts };

// Experts that are worked on together.
struct Batch {
    Packed packed;
    Range parts = {0, INT64_MAX};
    bool last = true;  // of the parts

    Range parts_of(const Product& product) const { return {parts.first, std::min(parts.end, product.parts().count)}; }

    std::vector<PackTask> packs = {};
    std::vector<RowsTask> tasks = {};

    // Halves the last task of each thread, so that all end at about the same time.
    void halve_last(int64_t threads) {
        if (threads == 1 || static_cast<int64_t>(tasks.size()) < many_tasks_per_thread * threads) return;
        const std::vector<RowsTask> last(tasks.end() - threads, tasks.end());
        tasks.resize(tasks.size() - threads);
        for (const auto& [expert, at, first, rows] : last) {
            const int64_t half = rows < 2 * tile_rows ? 0 : rows / 2;
            if (half > 0) tasks.push_back({expert, at, first, half});
            tasks.push_back({expert, at, first + half, rows - half});
        }
    }
};

struct Plan {
    std::vector<Product> products;
    int64_t threads;
    std::vector<Batch> batches;
    // Floats of packed right operands, of a result and of sums of rows that are added up over batches, and of a task's left
    // operand, result and block of a right operand; slots for as many tasks as are worked on at a time.
    int64_t right = 0, kept = 0, sums = 0, left = 0, result = 0, block = 0, slots = 0;

    Plan(std::vector<Product> of, int64_t num_threads) : products(std::move(of)), threads(num_threads) {
        const int64_t experts = products.size(), together = std::min(threads * right_words_per_thread, most_right_words);
        int64_t all_rows = 0, most_rows_of_one = 0, most_of_one = 0;
        for (const Product& product : products) {
            all_rows += product.m;
            most_rows_of_one = std::max(most_rows_of_one, product.m);
            most_of_one = std::max(most_of_one, product.m * std::max(product.words, product.n));
        }
        // Where a task is all of an expert, nobody else needs its right operand. A block of that then never leaves the second
        // cache: on processors whose third one is far away a tenth is won.
        if (most_rows_of_one <= std::min(ceil_div(all_rows, threads * tasks_per_thread), most_task_rows) &&
            most_of_one <= most_words_of_task) {
            add_batch(0, experts, most_task_rows, {Packed::by_tasks});
            return;
        }
        for (int64_t first = 0, end; first < experts; first = end) {
            int64_t size = products[first].right_size(), rows = products[first].m;
            for (end = first + 1; end < experts && size + products[end].right_size() <= together; ++end) {
                size += products[end].right_size();
                rows += products[end].m;
            }
            const int64_t tasks = threads * std::max(tasks_per_thread, ceil_div(rows, threads * task_rows));
            const int64_t most_rows = std::max(ceil_div(rows, tasks), 2 * tile_rows);
            const int64_t parts = products[first].parts().count;
            const int64_t part_size = padded(products[first].n) * most_words;
            if (size <= right_words_of_one || end > first + 1 || parts == 1) {
                add_batch(first, end, most_rows, {Packed::for_all});
                continue;
            }
            const Parts ranges(parts, std::max<int64_t>(right_words_of_one / part_size, 1));
            for (int64_t i = 0; i < ranges.count; ++i)
                add_batch(first, end, most_rows,
                          {Packed::in_parts, {ranges.start(i), ranges.start(i + 1)}, i + 1 == ranges.count});
        }
    }

    void add_batch(int64_t first, int64_t end, int64_t most_rows, Batch batch) {
        int64_t at = 0;
        for (int64_t e = first; e < end; ++e) {
            const Product& product = products[e];
            const Parts rows(product.m, most_rows), words = product.parts();
            const Range parts = batch.parts_of(product);
            const int64_t size = words.start(parts.end) - words.start(parts.first);
            for (int64_t i = 0; i < rows.count; ++i) {
                batch.tasks.push_back({e, at, rows.start(i), rows.size(i)});
                left = std::max(left, rows.size(i) * size);
                result = std::max(result, rows.size(i) * product.n);
            }
            if (batch.packed == Packed::by_tasks) {
                block = std::max(block, std::min(padded(product.n), block_columns) * words.most());
                continue;
            }
            for (int64_t part = parts.first; rows.count > 0 && part < parts.end; ++part)
                for (int64_t j = 0; j < product.n; j += block_columns) batch.packs.push_back({e, at, part, j});
            if (batch.packed == Packed::in_parts) {
                kept = std::max(kept, product.m * product.n);
                sums = std::max<int64_t>(sums, product.m * sizeof(double) / sizeof(float));
            }
            at += padded(product.n) * size;
        }
        if (batch.packed != Packed::by_tasks) batch.halve_last(threads);
        right = std::max(right, at);
        slots = std::max(slots, std::min<int64_t>(threads, batch.tasks.size()));
        batches.push_back(std::move(batch));
    }

    // Where each begins, and how long a slot is: at a vector's boundary, which no load of right operands then crosses.
    int64_t kept_at() const { return right; }
    int64_t sums_at() const { return kept_at() + aligned(kept); }
    int64_t slots_at() const { return sums_at() + aligned(sums); }
    int64_t result_in_slot() const { return aligned(left); }
    int64_t block_in_slot() const { return result_in_slot() + aligned(result); }
    int64_t slot() const { return block_in_slot() + aligned(block); }
    int64_t workspace_floats() const { return slots_at() + slots * slot(); }

    static int64_t aligned(int64_t floats) { return ceil_div(floats, lanes) * lanes; }
};

// With sums [m] of each expert's rows of the left operand, if that is not null, and what is done to rows of the result;
// if `result` is null, those are passed on and not kept.
template <bool bfloat16>
void run(const Plan& plan, const Operand& left, const Operand& right, float* workspace, bool add, float* result,
         float* sums, const RowFunction* then) {
    float* const kept = workspace + plan.kept_at();
    double* const sums_so_far = reinterpret_cast<double*>(workspace + plan.sums_at());
    float* const slots = workspace + plan.slots_at();
#pragma omp parallel num_threads(plan.threads)
    for (const Batch& batch : plan.batches) {
        const auto out_of = [&](const RowsTask& task, float* slot) {
            const Product& product = plan.products[task.expert];
            if (result != nullptr) return result + (product.result_row + task.first) * product.n;
            return batch.packed == Packed::in_parts ? kept + task.first * product.n : slot + plan.result_in_slot();
        };
        const auto pass_on = [&](const RowsTask& task, float* out) {
            const int64_t row = plan.products[task.expert].result_row + task.first;
            for (int64_t i = 0; then != nullptr && i < task.rows; ++i)
                (*then)(task.expert, row + i, {out, Type::float32}, i);
        };
#pragma omp for schedule(dynamic)
        for (size_t t = 0; t < batch.packs.size(); ++t) {
            const auto [e, at, part, column] = batch.packs[t];
            const Product& product = plan.products[e];
            const Parts words = product.parts();
            const int64_t word = words.start(part) - words.start(batch.parts.first);
            pack_right<bfloat16>(right, product, words.start(part), words.size(part), column,
                                 workspace + at + padded(product.n) * word + column * words.size(part));
        }
        const int64_t num_tasks = batch.tasks.size();
#pragma omp for schedule(dynamic)
        for (int64_t t = 0; t < num_tasks; ++t) {
            const RowsTask& task = batch.tasks[t];
            const Product& product = plan.products[task.expert];
            const Parts rows(task.rows, tile_rows), words = product.parts();
            const Range parts = batch.parts_of(product);
            float* const slot = slots + (num_tasks <= plan.slots ? t : this_thread()) * plan.slot();
            float* const out = out_of(task, slot);
            const bool more = add || parts.first > 0;
            if (words.count == 0 && !more) std::fill_n(out, task.rows * product.n, 0.0f);
            double of_rows[most_task_rows] = {};
            for (int64_t part = parts.first; part < parts.end; ++part)
                pack_left<bfloat16>(left, product, task.first, rows, words.start(part), words.size(part),
                                    slot + task.rows * (words.start(part) - words.start(parts.first)),
                                    sums == nullptr ? nullptr : of_rows);
            for (int64_t i = 0; sums != nullptr && i < task.rows; ++i) {
                float& sum = sums[product.result_row + task.first + i];
                const double before = parts.first > 0 ? sums_so_far[task.first + i] : add ? sum : 0.0;
                // Rounded once: whether there are several batches depends on the number of threads.
                if (batch.last)
                    sum = static_cast<float>(before + of_rows[i]);
                else
                    sums_so_far[task.first + i] = before + of_rows[i];
            }
            const auto packed_before = [&](int64_t part, int64_t column) {
                return workspace + task.at + padded(product.n) * (words.start(part) - words.start(parts.first)) +
                       column * words.size(part);
            };
            multiply_panels<bfloat16>(product, rows, parts, slot, more, out, [&](int64_t part, int64_t column) {
                const int64_t word = words.start(part), n = words.size(part);
                if (batch.packed != Packed::by_tasks) return packed_before(part, column);
                float* const own = slot + plan.block_in_slot();
                pack_right<bfloat16>(right, product, word, n, column, own);
                return own;
            }, [&](int64_t part, int64_t column) {
                const int64_t columns = std::min(block_columns, product.n - column), n = words.size(part);
                if (columns <= 0) return Ahead{};
                if (batch.packed != Packed::by_tasks) return Ahead{packed_before(part, column), padded(columns) * n};
                return right_ahead<bfloat16>(right, product, words.start(part), n, column, columns);
            });
            if (batch.packed != Packed::in_parts) pass_on(task, out);
        }
        if (batch.packed != Packed::in_parts || !batch.last) continue;
#pragma omp for schedule(static)
        for (int64_t t = 0; t < num_tasks; ++t) pass_on(batch.tasks[t], out_of(batch.tasks[t], nullptr));
    }
}

int64_t words_of(int64_t terms, bool bfloat16) {
    return ceil_div(terms, bfloat16 ? terms_of_word<true> : terms_of_word<false>);
}

Plan plan_of(const TimesWeights& of) {
    std::vector<Product> products;
    for (int64_t e = 0; e < of.groups.experts(); ++e) {
        const int64_t row = of.groups.starts[e], weights_row = e * (of.weights.transposed ? of.n : of.k);
        products.push_back({of.groups.rows(e), of.n, of.k, words_of(of.k, of.bfloat16), row, weights_row, row});
    }
    return Plan(products, of.threads);
}

Plan plan_of(const Outer& of) {
    std::vector<Product> products;
    for (int64_t e = 0; e < of.groups.experts(); ++e) {
        const int64_t row = of.groups.starts[e], rows = of.groups.rows(e);
        products.push_back({of.m, of.n, rows, words_of(rows, of.bfloat16), row, row, e * of.m});
    }
    return Plan(products, of.threads);
}

}  // namespace

bool have_products(Type type) {
    if (!have_avx512()) return false;
    if (type == Type::float32) return true;
    unsigned a = 0, b = 0, c = 0, amx = 0, bfloat16 = 0, unused = 0;
    const bool known = __get_cpuid_count(7, 0, &a, &b, &c, &amx) && __get_cpuid_count(7, 1, &bfloat16, &b, &c, &unused);
    return type == Type::bfloat16 && known && (bfloat16 & 1u << 5) != 0 && (amx & 1u << 22) == 0;
}

int64_t workspace_floats(const TimesWeights& product) { return plan_of(product).workspace_floats(); }
int64_t workspace_floats(const Outer& product) { return plan_of(product).workspace_floats(); }

void multiply(const TimesWeights& product, float* workspace, float* result, const RowFunction& then) {
    const Weights& weights = product.weights;
    const Operand left{product.tokens, product.k, false};
    const Operand right{{weights.matrix, nullptr, nullptr}, weights.transposed ? product.k : product.n, !weights.transposed};
    const auto by = product.bfloat16 ? run<true> : run<false>;
    by(plan_of(product), left, right, workspace, false, result, nullptr, &then);
}

void multiply(const Outer& product, float* workspace, float beta, Matrix result, float* sums) {
    const Operand left{product.left, product.m, true}, right{product.right, product.n, true};
    const auto by = product.bfloat16 ? run<true> : run<false>;
    const bool in_place = result.type == Type::float32;
    const RowFunction store = store_rows(product.n, result);
    by(plan_of(product), left, right, workspace, beta != 0.0f, in_place ? static_cast<float*>(result.at) : nullptr, sums,
       in_place ? nullptr : &store);
}
#else
bool have_products(Type) { return false; }
int64_t workspace_floats(const TimesWeights&) { return 0; }
int64_t workspace_floats(const Outer&) { return 0; }
void multiply(const TimesWeights&, float*, float*, const RowFunction&) {}
void multiply(const Outer&, float*, float, Matrix, float*) {}
#endif

}  // namespace ewa
