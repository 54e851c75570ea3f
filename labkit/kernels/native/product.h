// Rows of x times a weight of 4, 8 or 32 bits, 16 output features at a time; the weight is never written out.
//
// Codes lie in panels of 16 output features, so that one vector register holds one input's weights for all 16. A chunk
// is 8 inputs of a panel: of 4 bits, a 32-bit word for each of the 16 rows, the first input in its lowest bits; of 8
// bits, 16 bytes for each input. A group's `width` inputs share a scale and an offset for each row:
//
//     y[m, n] = sum over groups g of  scale[g, n] * (sum over k in g of x[m, k] * value[n, k]  +  offset[g, n] * sum over k in g of x[m, k])
//
// where value is table[code] (4 bits) or the code itself, signed (8 bits). Weights of 32 bits are plain float32 rows.
// All sums are float32.

#pragma once
#include <algorithm>
#include <cstring>
#include <vector>

#include "vectors.h"

namespace {

constexpr int CHUNK = 8;  // inputs that are loaded together

struct Linear {
    int32_t bits, half;      // half: scale and offset are float16, else float32
    const uint8_t* codes;    // (panels, chunks, ...) as above; of 32 bits, float32 (out, in)
    const float* table;      // (16,)
    const void* scale;       // (panels, groups, 16)
    const void* offset;      // the same, or null
    const float* bias;       // (out,), or null
    const int32_t* order;    // (columns,): which input comes first, second, ..., or null: as they are
    int64_t out, columns, in, width;  // in: columns padded to whole chunks; width: inputs of a group, whole chunks too

    long panels() const { return (out + LANES - 1) / LANES; }
    long groups() const { return (in + width - 1) / width; }
    long stored(long panel) const { return std::min<long>(LANES, out - panel * LANES); }
};

// What the two widths of codes have in common: the bytes of a chunk, and a chunk's values, input after input.

struct Four {
    static constexpr long BYTES = LANES * CHUNK / 2;
    Table table;
    explicit Four(const float* values) : table(table_of(values)) {}
    template <class Each>
    void chunk(const uint8_t* p, Each each) const {
        const Words codes = words(p);
        each(0, look_up<0>(table, codes)), each(1, look_up<1>(table, codes));
        each(2, look_up<2>(table, codes)), each(3, look_up<3>(table, codes));
        each(4, look_up<4>(table, codes)), each(5, look_up<5>(table, codes));
        each(6, look_up<6>(table, codes)), each(7, look_up<7>(table, codes));
    }
};

struct Eight {
    static constexpr long BYTES = LANES * CHUNK;
    explicit Eight(const float*) {}
    template <class Each>
    void chunk(const uint8_t* p, Each each) const {
        for (int i = 0; i < CHUNK; i++) each(i, load((const int8_t*)p + i * LANES));
    }
};

// Rows of x as a weight wants them: in its order, padded to whole chunks, with their sums over each group.
struct Input {
    const float* x;  // (rows, in)
    long rows;
    std::vector<float> arranged, sums;  // sums (rows, groups)

    Input(const Linear& w, const float* given, long count) : x(given), rows(count) {
        if (w.order || w.in != w.columns) {
            arranged.resize(rows * w.in);
            for (long m = 0; m < rows; m++)
                for (long k = 0; k < w.columns; k++) arranged[m * w.in + k] = given[m * w.columns + (w.order ? w.order[k] : k)];
            x = arranged.data();
        }
        if (!w.offset) return;
        sums.resize(rows * w.groups());
        for (size_t i = 0; i < sums.size(); i++) {
            const float* row = x + i / w.groups() * w.in;
            const long first = i % w.groups() * w.width, end = std::min<long>(w.in, first + w.width);
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (long k = first; k < end; k++) sum += row[k];
            sums[i] = sum;
        }
    }
};

// How many sums each of so many rows has, so that there are enough of them in all.
constexpr int sums_of(int rows) {
    int sums = 1;
    while (rows * sums < CHAINS) sums *= 2;
    return sums;
}

// y (ROWS, 16): the products of ROWS rows of x, (ROWS, in), with one panel; sums, (ROWS, groups), are those of x.
template <int ROWS, class Codes, class Stored>
void panel(const Linear& w, long n, const float* x, const float* sums, float* y) {
    constexpr int SUMS = sums_of(ROWS);
    const Codes codes(w.table);
    const long groups = w.groups(), in = w.in;
    const uint8_t* p = w.codes + n * (in / CHUNK) * Codes::BYTES;
    const Stored* scale = (const Stored*)w.scale + n * groups * LANES;
    const Stored* offset = w.offset ? (const Stored*)w.offset + n * groups * LANES : nullptr;
    Floats total[ROWS];
    for (auto& t : total) t = zeros();
    for (long g = 0; g < groups; g++) {
        Floats sum[ROWS][SUMS];
        for (auto& row : sum)
            for (auto& one : row) one = zeros();
        const long end = std::min<long>(in, (g + 1) * w.width);
        for (long k = g * w.width; k < end; k += CHUNK, p += Codes::BYTES) {
            codes.chunk(p, [&](int i, const Floats& value) {
                for (int m = 0; m < ROWS; m++)
                    sum[m][i % SUMS] = multiply_add(value, all(x[m * in + k + i]), sum[m][i % SUMS]);
            });
        }
        const Floats step = load(scale + g * LANES);
        for (int m = 0; m < ROWS; m++) {
            for (int i = 1; i < SUMS; i++) sum[m][0] = add(sum[m][0], sum[m][i]);
            if (offset) sum[m][0] = multiply_add(load(offset + g * LANES), all(sums[m * groups + g]), sum[m][0]);
            total[m] = multiply_add(sum[m][0], step, total[m]);
        }
    }
    for (int m = 0; m < ROWS; m++) store(y + m * LANES, total[m]);
}

template <class Codes, class Stored, int ROWS = TILE>
void tile(int rows, const Linear& w, long n, const float* x, const float* sums, float* y) {
    if constexpr (ROWS > 0) {
        if (rows == ROWS) panel<ROWS, Codes, Stored>(w, n, x, sums, y);
        else tile<Codes, Stored, ROWS - 1>(rows, w, n, x, sums, y);
    }
}

// The same of a weight of 32 bits, whose rows are read one after another.
inline void plain(int rows, const Linear& w, long n, const float* x, float* y) {
    const float* weight = (const float*)w.codes;
    for (long j = 0; j < w.stored(n); j++) {
        const float* row = weight + (n * LANES + j) * w.columns;
        for (int m = 0; m < rows; m++) {
            Floats sum[4] = {zeros(), zeros(), zeros(), zeros()};
            long k = 0;
            for (; k + 4 * LANES <= w.columns; k += 4 * LANES)
                for (int i = 0; i < 4; i++)
                    sum[i] = multiply_add(load(row + k + i * LANES), load(x + m * w.in + k + i * LANES), sum[i]);
            float rest = sum_of(add(add(sum[0], sum[1]), add(sum[2], sum[3])));
            for (; k < w.columns; k++) rest += row[k] * x[m * w.in + k];
            y[m * LANES + j] = rest;
        }
    }
}

// y (rows, 16), rows up to TILE: the products of rows first, first + 1, ... with panel n, and the bias.
inline void product(const Linear& w, long n, const Input& input, long first, int rows, float* y) {
    const float *x = input.x + first * w.in, *sums = input.sums.data() + first * w.groups();
    if (w.bits == 32) plain(rows, w, n, x, y);
    else if (w.bits == 4 && w.half) tile<Four, uint16_t>(rows, w, n, x, sums, y);
    else if (w.bits == 4) tile<Four, float>(rows, w, n, x, sums, y);
    else if (w.half) tile<Eight, uint16_t>(rows, w, n, x, sums, y);
    else tile<Eight, float>(rows, w, n, x, sums, y);
    for (int m = 0; w.bias && m < rows; m++)
        for (long j = 0; j < w.stored(n); j++) y[m * LANES + j] += w.bias[n * LANES + j];
}

// Calls each(n, first, rows, y) with the products of panels from..to, tile after tile of rows. Panels are taken in blocks
// that stay in the core's own cache while all rows pass.
template <class Each>
void products(const Linear& w, long from, long to, const Input& input, Each each) {
    const long bytes = std::max<long>(1, w.in * LANES * w.bits / 8), block = std::max(1L, (256L << 10) / bytes);
    float y[TILE * LANES];
    for (long start = from; start < to; start += block)
        for (long first = 0; first < input.rows; first += TILE) {
            const int rows = std::min<long>(TILE, input.rows - first);
            for (long n = start; n < std::min(to, start + block); n++) {
                product(w, n, input, first, rows, y);
                each(n, first, rows, y);
            }
        }
}

}  // namespace
