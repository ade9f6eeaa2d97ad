// What is done with a tile of a product while the next is multiplied.
//
// An epilogue has `begin(tile)`, called before the product, and `slice(d, slot, in, tile, row, n)`, called by a
// warpgroup for every 64 rows × `slice_columns` columns of accumulators: it leaves `outputs` blocks of 64 rows of
// `slice_width` elements in shared memory from `slot` on, swizzled, of which the first `wanted` then go where
// `Maps::out` says; or, if it `scatters`, where its `scatter` puts them. From `in` on are `inputs` such blocks of what
// `Maps::in` says, of the same rows and columns. `row`: the slice's first, of the tile; n: its number there.
// `d`: this thread's accumulators, see `wgmma`. If `b_in_halves`, a tile has columns of two halves of B, which are apart
// in memory.
#pragma once

#include "../random.h"
#include "activations.cuh"
#include "deal.cuh"
#include "groups.cuh"
#include "instructions.cuh"
#include "layer.h"
#include "schedule.h"

namespace ewa::hopper {

// This thread's first row of the 16 of its warp, of a slice's 64; it has the one 8 further down too.
__device__ __forceinline__ int own_row() { return thread_id() % 128 / 32 * 16 + thread_id() % 32 / 4; }
// And its first column of every 8; it has the next one too.
__device__ __forceinline__ int own_column() { return thread_id() % 4 * 2; }

// Where this lane's row is, of its warp's 16 rows × columns 16 j … 16 j + 15 of a block, for stmatrix and ldmatrix.
__device__ __forceinline__ uint32_t matrix_row(uint32_t block, int j) {
    const uint32_t lane = thread_id() % 32;
    return block + swizzled_offset(thread_id() % 128 / 32 * 16 + (lane & 15), 2 * j + (lane >> 4));
}

// Columns 16 j … 16 j + 15 of a slice: what this thread has of them, in the order of its accumulators.
template <Operand kType>
__device__ __forceinline__ void put_columns(uint32_t block, int j, const float* v) {
    stmatrix_x4(matrix_row(block, j), pack<kType>(v[0], v[1]), pack<kType>(v[2], v[3]), pack<kType>(v[4], v[5]),
                pack<kType>(v[6], v[7]));
}

// out = d; and sums [E · splits, M] over K of A's rows, unless null. kParts: out [E · splits, M, N] is float32.
template <Operand kType, bool kParts>
struct StoreSummed {
    static constexpr int outputs = 1, inputs = 0;
    static constexpr int slice_columns = kParts ? 32 : 64, slice_width = slice_columns;  // of 128 bytes
    static constexpr int scratch_bytes = 512;  // of each warpgroup: together the ones
    static constexpr bool b_in_halves = false, scatters = false, sums_rows = true;
    struct Arguments {
        float* sums;
        int size_m, splits;
    };
    const Arguments& with;

    __device__ StoreSummed(const Arguments& arguments, uint32_t) : with(arguments) {}
    __device__ static int wanted() { return outputs; }
    __device__ __forceinline__ void begin(const Tile&) {}
    __device__ __forceinline__ bool wants_sums(const Tile& tile) const {
        return tile.column == 0 && with.sums != nullptr;
    }

    // All columns hold the same; `row`: the warpgroup's first.
    __device__ __forceinline__ void put_sums(const float (&sums)[4], const Tile& tile, int row) const {
        float* to = with.sums + (static_cast<int64_t>(tile.expert) * with.splits + tile.split) * with.size_m;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int m = row + own_row() + 8 * h;
            if (thread_id() % 4 == 0 && m < with.size_m) store_global_f32(to + m, sums[2 * h]);
        }
    }

    __device__ __forceinline__ void slice(const float* d, uint32_t slot, uint32_t, const Tile&, int, int) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            if constexpr (!kParts) {
                put_columns<kType>(slot, j, d + 8 * j);
            } else {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const int row = own_row() + 8 * h, column = 8 * j + own_column();
                    store_shared_f32x2(slot + swizzled_offset(row, column / 4) + column % 4 * 4,
                                       {d[4 * j + 2 * h], d[4 * j + 2 * h + 1]});
                }
            }
        }
    }
};

__device__ __forceinline__ float number(const Bias& bias, int64_t i) {
    if (bias.type == none) return 0.0f;
    if (bias.type == float32) return load_constant_f32(static_cast<const float*>(bias.data) + i);
    const uint32_t bits = load_constant_u16(static_cast<const uint16_t*>(bias.data) + i);
    return bias.type == bfloat16 ? unpack<Operand::bf16>(bits).x : unpack<Operand::f16>(bits).x;
}

// Biases of a tile's columns, in shared memory; each warpgroup has its own.
template <int kColumns>
struct Biases {
    uint32_t at;

    // `index(i)`: which of all biases, or −1 for none.
    template <class Index>
    __device__ __forceinline__ void load(const Bias& bias, Index&& index) const {
        for (int i = thread_id() % 128; i < kColumns; i += 128) {
            const int64_t k = index(i);
            store_shared_f32(at + 4 * i, k >= 0 ? number(bias, k) : 0.0f);
        }
    }
    // Four accumulators, of two columns and two rows, and their biases; `column`: the first of eight of the tile.
    __device__ __forceinline__ void add(float* v, const float* d, int column) const {
        const float2 b = load_shared_f32x2(at + 4 * (column + own_column()));
        v[0] = d[0] + b.x;
        v[1] = d[1] + b.y;
        v[2] = d[2] + b.x;
        v[3] = d[3] + b.y;
    }
};

// y[permutation[row]] = (d + bias) · routing weight. For cooperative products, whose warpgroups have 64 rows of a tile
// each.
template <Operand kType, int kColumns>
struct StoreScattered {
    static constexpr int outputs = 1, inputs = 0, slice_columns = 64, slice_width = 64, scratch_bytes = kColumns * 4;
    static constexpr bool b_in_halves = false, scatters = true, sums_rows = false;

    struct Arguments {
        Bias bias;                     // [E, D]
        const float* routing_weights;  // [R], by choice; null: 1
        Owners owners;                 // of a permutation that is there
        void* y;                       // [R, D]
        int d_model;
    };
    const Arguments& with;
    Biases<kColumns> biases;
    int targets[4];    // of the rows that this thread stores; −1: there is no such row
    float factors[2];  // of those that it has accumulators of

    __device__ StoreScattered(const Arguments& arguments, uint32_t scratch) : with(arguments), biases{scratch} {}

    __device__ __forceinline__ void begin(const Tile& tile) {
        biases.load(with.bias, [&](int i) {
            const int column = tile.column * kColumns + i;
            return column < with.d_model ? static_cast<int64_t>(tile.expert) * with.d_model + column : -1;
        });
        const int first = thread_id() / 128 * 64;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = first + thread_id() % 128 / 8 + 16 * i;
            targets[i] = row < tile.size ? with.owners.choice(tile.start + row) : -1;
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = first + own_row() + 8 * h;
            const bool has_factor = with.routing_weights != nullptr && row < tile.size;
            factors[h] = 1.0f;
            if (has_factor)
                factors[h] = load_constant_f32(with.routing_weights + with.owners.choice(tile.start + row));
        }
    }

    __device__ __forceinline__ void slice(const float* d, uint32_t slot, uint32_t, const Tile&, int, int n) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            float v[8];
#pragma unroll
            for (int h = 0; h < 2; ++h) biases.add(v + 4 * h, d + 8 * j + 4 * h, n * 64 + 16 * j + 8 * h);
#pragma unroll
            for (int i = 0; i < 8; ++i) v[i] *= factors[i / 2 % 2];
            put_columns<kType>(slot, j, v);
        }
    }

    // Eight threads have 64 columns of a row, 16 bytes each.
    __device__ __forceinline__ void scatter(uint32_t slot, int column) {
        const int chunk = thread_id() % 8, inside = column + 8 * chunk;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int r = thread_id() % 128 / 8 + 16 * i;
            if (targets[i] >= 0 && inside < with.d_model)
                store_global_u32x4(static_cast<uint16_t*>(with.y) + int64_t{targets[i]} * with.d_model + inside,
                                   load_shared_u32x4(slot + swizzled_offset(r, chunk)));
        }
    }
};

// What this thread's elements of 64 grouped rows are multiplied by.
template <bool kDropout>
struct Dropped {
    uint32_t threshold, of_rows[2], column_key;
    float scale;

    __device__ __forceinline__ Dropped(const Dropout& dropout, int first_row) {
        if constexpr (kDropout) {
            const DropoutKeys keys(value_of(dropout.seed));
            threshold = dropout.threshold;
            scale = dropout.scale;
            column_key = keys.column;
#pragma unroll
            for (int h = 0; h < 2; ++h) of_rows[h] = keys.of_row(first_row + own_row() + 8 * h);
        }
    }
    // Four elements, of two columns and two rows; `column`: the first of eight.
    __device__ __forceinline__ void multiply(float* v, int column) const {
        if constexpr (kDropout) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const uint32_t of_column = mix32(static_cast<uint32_t>(column + own_column() + i) ^ column_key);
#pragma unroll
                for (int h = 0; h < 2; ++h)
                    v[2 * h + i] *= dropout_bits(of_rows[h], of_column) < threshold ? 0.0f : scale;
            }
        }
    }
};

// hidden = activation(d + bias), or activation(gate + bias) · (value + bias), with dropout. Out: hidden, then
// pre_activation, or its gates and its values, unless nobody wants it.
//
// Gated, the first half of a tile's columns are gates and the second their values, so that a thread has both.
template <Operand kType, int kColumns, class Activation, bool kGated, bool kDropout>
struct StoreHidden {
    static constexpr int outputs = kGated ? 3 : 2, inputs = 0, slice_columns = kGated ? 128 : 64, slice_width = 64;
    static constexpr int scratch_bytes = kColumns * 4;  // biases
    static constexpr bool b_in_halves = kGated, scatters = false, sums_rows = false;
    static_assert(!kGated || kColumns == 128);

    struct Arguments {
        Bias bias;  // [E, F or 2F]
        int d_ff;
        Dropout dropout;
        bool saves;  // pre_activation
    };
    const Arguments& with;
    Biases<kColumns> biases;

    __device__ StoreHidden(const Arguments& arguments, uint32_t scratch) : with(arguments), biases{scratch} {}
    __device__ __forceinline__ int wanted() const { return with.saves ? outputs : 1; }

    __device__ __forceinline__ void begin(const Tile& tile) {
        constexpr int width = kGated ? kColumns / 2 : kColumns;  // of hidden
        const int64_t first = static_cast<int64_t>(tile.expert) * with.d_ff * (kGated ? 2 : 1);
        biases.load(with.bias, [&](int i) {
            const int column = tile.column * width + i % width, of_values = i / width * with.d_ff;
            return column < with.d_ff ? first + of_values + column : -1;
        });
    }

    __device__ __forceinline__ void slice(const float* d, uint32_t slot, uint32_t, const Tile& tile, int row, int n) {
        Dropped<kDropout> dropped(with.dropout, tile.start + row);
        const int first = tile.column * (kGated ? kColumns / 2 : kColumns) + n * 64;  // of hidden
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            float pre[8], value[8], hidden[8];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int column = 16 * j + 8 * h;
                biases.add(pre + 4 * h, d + 8 * j + 4 * h, n * 64 + column);
                if (kGated) biases.add(value + 4 * h, d + 32 + 8 * j + 4 * h, 64 + column);
#pragma unroll
                for (int i = 4 * h; i < 4 * h + 4; ++i) {
                    hidden[i] = Activation::value(pre[i]);
                    if (kGated) hidden[i] *= value[i];
                }
                dropped.multiply(hidden + 4 * h, first + column);
            }
            // At once: what waits for its turn takes registers.
            put_columns<kType>(slot, j, hidden);
            put_columns<kType>(slot + atom_bytes, j, pre);
            if (kGated) put_columns<kType>(slot + 2 * atom_bytes, j, value);
        }
    }
};

// From d, the gradient of hidden, and pre_activation: grad_pre, and hidden once more. In: pre_activation, or its gates
// and values; out: grad_pre, or those of the gates and of the values, then hidden. kScaled: with dropout, or routing
// weights, by which d is multiplied, but not hidden; `partial_routing` takes the sums of their gradients over a slice.
template <Operand kType, int kColumns, class Activation, bool kGated, bool kScaled>
struct StoreGradPre {
    static constexpr int outputs = kGated ? 3 : 2, inputs = kGated ? 2 : 1;
    static constexpr int slice_columns = 64, slice_width = 64, scratch_bytes = 0;
    static constexpr bool b_in_halves = false, scatters = false, sums_rows = false;

    struct Arguments {
        Dropout dropout;
        const float* routing_weights;  // [R], by choice; null: 1
        Owners owners;                 // of a permutation that is there, with routing weights
        float* partial_routing;        // [⌈F/64⌉, R], by row, or null
        int d_ff, num_rows;
    };
    const Arguments& with;

    __device__ StoreGradPre(const Arguments& arguments, uint32_t) : with(arguments) {}
    __device__ static int wanted() { return outputs; }
    __device__ __forceinline__ void begin(const Tile&) {}

    __device__ __forceinline__ float factor_of(int row) const {
        if (with.routing_weights == nullptr) return 1.0f;
        return load_constant_f32(with.routing_weights + with.owners.choice(row));
    }

    __device__ __forceinline__ void slice(const float* d, uint32_t slot, uint32_t in, const Tile& tile, int row,
                                          int n) {
        const int own = row + own_row();
        // hidden is 0 in a row that is not there: what it is multiplied with there is 0, and it might be infinite.
        const bool exists[2] = {own < tile.size, own + 8 < tile.size};
        Dropped<kScaled> dropped(with.dropout, tile.start + row);
        float factors[2], of_routing[2] = {0.0f, 0.0f};
#pragma unroll
        for (int h = 0; h < 2; ++h) factors[h] = kScaled && exists[h] ? factor_of(tile.start + own + 8 * h) : 1.0f;
        const int first = tile.column * kColumns + n * 64;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            uint32_t gates[4], values[4];
            ldmatrix_x4(matrix_row(in, j), gates);
            if (kGated) ldmatrix_x4(matrix_row(in + atom_bytes, j), values);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                gates[i] = exists[i % 2] ? gates[i] : 0;
                if (kGated) values[i] = exists[i % 2] ? values[i] : 0;
            }
            float grad_gate[8], grad_value[8], hidden[8];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float kept[4] = {1.0f, 1.0f, 1.0f, 1.0f}, of_row[4];
                if (kScaled && with.dropout.threshold != 0) dropped.multiply(kept, first + 16 * j + 8 * h);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float2 pair = unpack<kType>(gates[2 * h + i / 2]);
                    const ActivationAndSlope act = Activation::both(i % 2 == 0 ? pair.x : pair.y);
                    float grad = d[8 * j + 4 * h + i], out = act.value, value = 1.0f;
                    if (kGated) {
                        const float2 of_value = unpack<kType>(values[2 * h + i / 2]);
                        value = i % 2 == 0 ? of_value.x : of_value.y;
                        out *= value;
                    }
                    if (kScaled) {
                        grad *= kept[i];
                        of_row[i] = grad * out;
                        grad *= factors[i / 2];
                        out *= kept[i];
                    }
                    if (kGated) {
                        grad_value[4 * h + i] = grad * act.value;
                        grad *= value;
                    }
                    grad_gate[4 * h + i] = grad * act.slope;
                    hidden[4 * h + i] = out;
                }
                // In a branch of its own, which also keeps the compiler from having too much under way.
                if (kScaled && with.partial_routing != nullptr) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) of_routing[i / 2] += of_row[i];
                }
            }
            put_columns<kType>(slot, j, grad_gate);
            if (kGated) put_columns<kType>(slot + atom_bytes, j, grad_value);
            put_columns<kType>(slot + (outputs - 1) * atom_bytes, j, hidden);
        }
        if (kScaled && with.partial_routing != nullptr && first < with.d_ff) {
            float* to = with.partial_routing + int64_t{first / 64} * with.num_rows + tile.start + own;
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                // Of the four threads that have a row.
                float sum = of_routing[h] + shuffle_xor(of_routing[h], 1);
                sum += shuffle_xor(sum, 2);
                if (exists[h] && thread_id() % 4 == 0) store_global_f32(to + 8 * h, sum);
            }
        }
    }
};

}  // namespace ewa::hopper
