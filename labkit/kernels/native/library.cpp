// What Python calls, by ctypes: build.py compiles this file, native_cpu.py, columns.py and step.py pass it pointers.

#include <numeric>

#include "columns.h"
#include "product.h"
#include "step.h"

extern "C" {

const char* labkit_arithmetic() { return ARITHMETIC; }

// y (rows, out) = x (rows, columns) times the weight.
void labkit_linear(const Linear* weight, const float* x, float* y, long rows, int threads) {
    const Linear& w = *weight;
    Input input;
    const long panels = w.panels(), parts = std::min<long>(threads, panels);
    input.make_room(w, x, rows);
    Barrier barrier(parts);
    in_parallel(parts, [&](long part) {
        for (long m = rows * part / parts; m < rows * (part + 1) / parts; m++) input.row(w, m);
        barrier.wait();
        const long from = panels * part / parts, to = panels * (part + 1) / parts;
        products(w, from, to, input, w.codes_of(from), [&](long n, long first, int count, const float* found) {
            for (int m = 0; m < count; m++)
                std::memcpy(y + (first + m) * w.out + n * LANES, found + m * LANES, w.stored(n) * sizeof(float));
        });
    });
}

// The sum of x (count,), a multiple of 64: what reading memory costs, by the reads that products make and nothing else.
float labkit_sum(const float* x, long count, int threads) {
    constexpr int SUMS = 4;
    const long blocks = count / (SUMS * LANES);
    std::vector<float> totals(threads);
    in_parallel(threads, [&](long part) {
        Floats sum[SUMS] = {zeros(), zeros(), zeros(), zeros()};
        const Stretch here = {(const uint8_t*)(x + count), (const uint8_t*)x};
        for (long b = blocks * part / threads; b < blocks * (part + 1) / threads; b++) {
            const float* p = x + b * SUMS * LANES;
            fetch_ahead((const uint8_t*)p, sizeof(float) * SUMS * LANES, here);
            for (int i = 0; i < SUMS; i++) sum[i] = add(sum[i], load(p + i * LANES));
        }
        for (const Floats& one : sum) totals[part] += sum_of(one);
    });
    return std::accumulate(totals.begin(), totals.end(), 0.f);
}

// A block of GPTQ: see columns.h.
void labkit_columns(const Columns* columns, int threads) { round_columns(*columns, threads); }

// New tokens of some sequences: see step.h.
void labkit_step(const Model* model, const Cache* cache, const int32_t* table, long pages, const int64_t* starts,
                 const int64_t* tokens, long rows, long count, float* logits, int64_t* likeliest, int threads) {
    step(*model, *cache, table, pages, starts, tokens, rows, count, logits, likeliest, threads);
}
}
