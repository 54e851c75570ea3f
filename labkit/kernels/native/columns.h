// GPTQ's loop over the columns of one block (arXiv 2210.17323, algorithm 1), 16 rows of the weight at a time: a block of these
// stays in the nearest cache until all of its columns are rounded, and no row knows of another.

#pragma once
#include <algorithm>
#include <vector>

#include "threads.h"
#include "vectors.h"

namespace {

// Matrices (rows, width) lie column by column, `rows` numbers apart, but u (width, width), whose rows are `apart` numbers apart.
struct Columns {
    float* w;                    // in: the weights; out: columns start..stop on their grid, those behind them made up
    const float *scale, *zero;   // of every weight
    const float* u;              // an upper triangle: the factor of H^-1
    float* err;                  // out: columns start..stop of what each missed, over its d
    int64_t rows, width, apart, start, stop;
    float lowest, highest;       // codes
    int32_t real;                // whether zero points are reals: they are then added before rounding
};

inline void round_rows(const Columns& c, long first, float* block) {
    const long rows = std::min<long>(LANES, c.rows - first);
    std::fill(block, block + c.width * LANES, 0);
    for (long k = c.start; k < c.width; k++) std::memcpy(block + k * LANES, c.w + k * c.rows + first, rows * sizeof(float));
    for (long j = c.start; j < c.stop; j++) {
        float *w = block + j * LANES, scale[LANES] = {}, zero[LANES] = {}, err[LANES];
        std::memcpy(scale, c.scale + j * c.rows + first, rows * sizeof(float));
        std::memcpy(zero, c.zero + j * c.rows + first, rows * sizeof(float));
        const float* u = c.u + j * c.apart;
#pragma omp simd
        for (int i = 0; i < LANES; i++) {
            const float steps = w[i] / (scale[i] == 0 ? 1 : scale[i]);
            const float code = c.real ? __builtin_rintf(steps + zero[i]) : __builtin_rintf(steps) + zero[i];
            const float q = (std::min(std::max(code, c.lowest), c.highest) - zero[i]) * scale[i];
            err[i] = (w[i] - q) / u[j];
            w[i] = q;
        }
        std::memcpy(c.err + j * c.rows + first, err, rows * sizeof(float));
        const Floats missed = load(err);
        for (long k = j + 1; k < c.width; k++)
            store(block + k * LANES, multiply_add(missed, all(-u[k]), load(block + k * LANES)));
    }
    for (long k = c.start; k < c.width; k++) std::memcpy(c.w + k * c.rows + first, block + k * LANES, rows * sizeof(float));
}

inline void round_columns(const Columns& c, int threads) {
    const long blocks = (c.rows + LANES - 1) / LANES;
    in_parallel(threads, [&](long part) {
        std::vector<float> block(c.width * LANES);
        for (long b = blocks * part / threads; b < blocks * (part + 1) / threads; b++) round_rows(c, b * LANES, block.data());
    });
}

}  // namespace
