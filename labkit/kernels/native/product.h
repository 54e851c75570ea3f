// Rows of x times a weight of 4, 8 or 32 bits, 16 output features at a time; the weight is never written out.
//
// Codes lie in panels of 16 output features, so that one vector register holds one input's weights for all 16, or four
// inputs' bytes. A chunk is 8 inputs of a panel: of 4 bits, a 32-bit word for each of the 16 rows, whose byte i holds input i
// in its lower half and input i + 4 in its upper; of 8 bits, a word with inputs 0 to 3 for each row, then one with 4 to 7.
// A group's `width` inputs share a scale and an offset for each row:
//
//     y[m, n] = sum over groups g of  scale[g, n] * (sum over k in g of x[m, k] * value[n, k]  +  offset[g, n] * sum over k in g of x[m, k])
//
// where value is table[code] (4 bits) or the code itself, signed (8 bits). Weights of 32 bits are plain float32 rows.
//
// Where each row has a table of its own, a register holds 16 inputs' weights of one row instead: a chunk is 8 times 16 inputs of
// a row, and the word of lane i holds input i of each sixteen. Rows stand one after another then, not in panels.
//
// There are two kinds of arithmetic. Where input_width is 0, x stays float32, and so do all sums. Else x is rounded first, each
// row by itself: input_width numbers that stand together become whole numbers from -127 to 127 of a step, which is the largest
// of them over 127. Such a run times the codes is summed in int32, exactly, and only then multiplied by steps and scales.

#pragma once
#include <algorithm>
#include <cstring>
#include <vector>

#include "vectors.h"

namespace {

constexpr int CHUNK = 8;  // inputs that are loaded together

struct Linear {
    int32_t bits, half;      // half: scale and offset are float16, else float32
    int32_t own;             // each row has its own table, float16 too where half; there is no offset
    const uint8_t* codes;    // (panels, chunks, ...) as above; of 32 bits, float32 (out, in)
    const float* table;      // (16,); (out, 16) where own
    const void* scale;       // (panels, groups, 16); (out, groups) where own
    const void* offset;      // the same, or null
    const float* bias;       // (out,), or null
    const int32_t* order;    // (columns,): which input comes first, second, ..., or null: as they are
    int64_t out, columns, in, width;  // in: columns padded to whole chunks; width: inputs of a group, whole chunks too
    int64_t input_width;              // inputs that share a step, whole chunks; 0: they are not rounded

    long panels() const { return (out + LANES - 1) / LANES; }
    long groups() const { return (in + width - 1) / width; }
    const uint8_t* codes_of(long n) const { return codes + n * LANES * in * bits / 8; }
    long stored(long panel) const { return std::min<long>(LANES, out - panel * LANES); }
    // A run's inputs share step and scale. Of the two widths one is a multiple of the other, or as long as the row.
    long run() const { return std::min(width, input_width); }
    long runs() const { return (in + run() - 1) / run(); }
    // What is to be added to a byte that is multiplied, so that it is a value: where x is rounded, values are whole numbers.
    int32_t base() const { return bits == 4 ? int32_t(table[0]) : -BELOW; }
};

// What the two widths of codes have in common: the bytes of a chunk; its values, input after input; its codes by fours.

struct Four {
    static constexpr long BYTES = LANES * CHUNK / 2;
    Table table;
    explicit Four(const float* values) : table(table_of(values)) {}
    template <class Each>
    void chunk(const uint8_t* p, Each each) const {
        const Words codes = words(p);
        each(0, look_up<0>(table, codes)), each(1, look_up<2>(table, codes));
        each(2, look_up<4>(table, codes)), each(3, look_up<6>(table, codes));
        each(4, look_up<1>(table, codes)), each(5, look_up<3>(table, codes));
        each(6, look_up<5>(table, codes)), each(7, look_up<7>(table, codes));
    }
    template <class Each>
    static void fours(const uint8_t* p, Each each) {
        const Words codes = words(p);
        each(0, low_halves(codes)), each(1, high_halves(codes));
    }
    static Ints times(Ints sum, Words codes, int32_t x) { return dot(sum, codes, x); }
};

struct Eight {
    static constexpr long BYTES = LANES * CHUNK;
    explicit Eight(const float*) {}
    template <class Each>
    void chunk(const uint8_t* p, Each each) const {
        fours(p, [&](int i, const Words& codes) {
            each(4 * i, byte<0>(codes)), each(4 * i + 1, byte<1>(codes));
            each(4 * i + 2, byte<2>(codes)), each(4 * i + 3, byte<3>(codes));
        });
    }
    template <class Each>
    static void fours(const uint8_t* p, Each each) {
        each(0, words(p)), each(1, words(p + BYTES / 2));
    }
    static Ints times(Ints sum, Words codes, int32_t x) { return dot_signed(sum, codes, x); }
};

// What a run of a rounded row is multiplied by, what its bytes are short of their values, times the run's codes, and the
// sum of these.
struct Run {
    float step;
    int32_t start;
    float count;
};

// Rows of x as a weight wants them: in its order, padded to whole chunks, rounded where it asks for that, with their sums over
// each group. One that is used again keeps its memory.
//
// Rounded rows are taken by tiles, since a tile is what a panel is multiplied by: of its rows first, first + 1, ... all that
// is read together lies together.
class Input {
public:
    long rows = 0, in = 0, groups = 0, runs = 0;
    const float* x;             // (rows, in)
    std::vector<float> sums;    // (rows, groups), where the weight has offsets
    std::vector<int8_t> codes;  // where x is rounded, tile after tile: (in / 4, rows, 4)
    std::vector<Run> all_runs;  // and (runs, rows)

    void take(const Linear& w, const float* given, long count) {
        make_room(w, given, count);
        for (long m = 0; m < rows; m++) row(w, m);
    }

    // Whether what was taken for another weight is what this one wants.
    bool fits(const Linear& w) const {
        return w.in == taken_.in && w.columns == taken_.columns && w.order == taken_.order && w.width == taken_.width &&
               w.input_width == taken_.input_width && !w.offset == !taken_.offset && (!runs || w.base() == taken_.base());
    }

    // The two halves of `take`: so that threads can share the rows.
    void make_room(const Linear& w, const float* given, long count) {
        taken_ = w;
        const bool moved = w.order || w.in != w.columns;
        rows = count, in = w.in, groups = w.groups(), runs = w.input_width ? w.runs() : 0, given_ = given;
        if (moved) arranged_.assign(rows * in, 0);
        x = moved ? arranged_.data() : given;
        if (runs) codes.resize(rows * in), all_runs.resize(rows * runs);
        else if (w.offset) sums.resize(rows * groups);
    }

    void row(const Linear& w, long m) {
        if (x != given_)
            for (long k = 0; k < w.columns; k++) arranged_[m * in + k] = given_[m * w.columns + (w.order ? w.order[k] : k)];
        if (runs) return round(w, m);
        const float* from = x + m * in;
        for (long g = 0; w.offset && g < groups; g++) {
            float sum = 0;
            const long end = std::min<long>(in, (g + 1) * w.width);
#pragma omp simd reduction(+ : sum)
            for (long k = g * w.width; k < end; k++) sum += from[k];
            sums[m * groups + g] = sum;
        }
    }

private:
    Linear taken_{};  // the weight it was last taken for
    const float* given_;  // (rows, columns)
    std::vector<float> arranged_;

    void round(const Linear& w, long m) {
        const float* from = x + m * in;
        const long first = m / TILE * TILE, stride = std::min<long>(TILE, rows - first);
        int8_t* to = &codes[first * in + (m - first) * 4];
        Run* run = &all_runs[first * runs + (m - first)];
        float step = 0;
        for (long k = 0; k < in; run += stride) {
            const long end = std::min<long>(in, k + w.run());
            if (k % w.input_width == 0) step = step_of(from + k, std::min<long>(in - k, w.input_width));
            ChunkInts count = no_ints();
            for (; k < end; k += CHUNK, to += 8 * stride) {
                const ChunkInts chunk = nearest(load_eight(from + k), step == 0 ? 1 : step);
                count = add(count, chunk);
                store_fours(chunk, to, to + 4 * stride);
            }
            const int32_t sum = sum_of(count);
            *run = {step, w.base() * sum, float(sum)};
        }
    }

    // The largest of so many sizes, over 127; nan where one is infinite, since the others are then no codes of it. Sizes are
    // compared as integers, in which what is no number is larger than all that are.
    static float step_of(const float* x, long size) {
        ChunkInts sizes = no_ints();
        for (long k = 0; k < size; k += CHUNK) sizes = larger_of_sizes(sizes, load_eight(x + k));
        const float largest = largest_of(sizes), step = largest / 127;
        if (std::isinf(step)) return NAN;
        return step == 0 && largest != 0 ? 1.4e-45f : step;  // the smallest there is: a step of 0 would lose the run
    }
};

// How many sums each of so many rows has, so that there are enough of them in all.
constexpr int sums_of(int rows) {
    int sums = 1;
    while (rows * sums < CHAINS) sums *= 2;
    return sums;
}

// y (ROWS, 16): the products of rows first, first + 1, ... with one panel, of float32.
template <int ROWS, class Codes, class Stored>
void panel(const Linear& w, long n, const Input& input, long first, const Stretch& here, float* y) {
    constexpr int SUMS = sums_of(ROWS);
    const Codes codes(w.table);
    const long groups = w.groups(), in = w.in;
    const uint8_t* p = w.codes_of(n);
    const Stored* scale = (const Stored*)w.scale + n * groups * LANES;
    const Stored* offset = w.offset ? (const Stored*)w.offset + n * groups * LANES : nullptr;
    const float *x = input.x + first * in, *sums = input.sums.data() + first * groups;
    Floats total[ROWS];
    for (auto& t : total) t = zeros();
    for (long g = 0, k = 0; g < groups; g++) {
        Floats sum[ROWS][SUMS];
        for (auto& row : sum)
            for (auto& one : row) one = zeros();
        for (const long end = std::min(in, k + w.width); k < end; k += CHUNK, p += Codes::BYTES) {
            fetch_ahead(p, Codes::BYTES, here);
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

// The same of rounded rows, run after run.
template <int ROWS, class Codes, class Stored>
void rounded_panel(const Linear& w, long n, const Input& input, long first, const Stretch& here, float* y) {
    const long groups = w.groups(), in = w.in, length = w.run();
    const uint8_t* p = w.codes_of(n);
    const Stored* scale = (const Stored*)w.scale + n * groups * LANES;
    const Stored* offset = w.offset ? (const Stored*)w.offset + n * groups * LANES : nullptr;
    const int8_t* x = &input.codes[first * in];
    const Run* run = &input.all_runs[first * input.runs];
    Floats total[ROWS];
    for (auto& t : total) t = zeros();
    for (long k = 0, group_end = w.width; k < in; run += ROWS) {
        Ints sum[ROWS];
        for (int m = 0; m < ROWS; m++) sum[m] = all_of(run[m].start);
        for (const long end = std::min(in, k + length); k < end; k += CHUNK, p += Codes::BYTES, x += ROWS * CHUNK) {
            fetch_ahead(p, Codes::BYTES, here);
            Codes::fours(p, [&](int i, const Words& codes) {
                for (int m = 0; m < ROWS; m++) sum[m] = Codes::times(sum[m], codes, four(x + (i * ROWS + m) * 4));
            });
        }
        const Floats step = load(scale), low = offset ? load(offset) : zeros();
        for (int m = 0; m < ROWS; m++) {
            Floats found = floats(sum[m]);
            if (offset) found = multiply_add(low, all(run[m].count), found);
            total[m] = multiply_add(found, multiply(step, all(run[m].step)), total[m]);
        }
        if (k < group_end) continue;
        group_end += w.width, scale += LANES;
        if (offset) offset += LANES;
    }
    for (int m = 0; m < ROWS; m++) store(y + m * LANES, total[m]);
}

template <class Codes, class Stored, int ROWS = TILE>
void tile(int rows, const Linear& w, long n, const Input& input, long first, const Stretch& here, float* y) {
    if constexpr (ROWS > 0) {
        if (rows < ROWS) tile<Codes, Stored, ROWS - 1>(rows, w, n, input, first, here, y);
        else if (w.input_width) rounded_panel<ROWS, Codes, Stored>(w, n, input, first, here, y);
        else panel<ROWS, Codes, Stored>(w, n, input, first, here, y);
    }
}

// The same of a weight of 32 bits: ROWS rows of x times OUT rows of the weight, which are read one after another.
template <int ROWS, int OUT>
void dots(const float* x, const float* weight, long columns, float* y) {
    Floats sum[ROWS][OUT];
    for (auto& row : sum)
        for (auto& one : row) one = zeros();
    long k = 0;
    for (; k + LANES <= columns; k += LANES) {
        Floats part[ROWS];
        for (int m = 0; m < ROWS; m++) part[m] = load(x + m * columns + k);
        for (int j = 0; j < OUT; j++) {
            const Floats values = load(weight + j * columns + k);
            for (int m = 0; m < ROWS; m++) sum[m][j] = multiply_add(values, part[m], sum[m][j]);
        }
    }
    for (int m = 0; m < ROWS; m++)
        for (int j = 0; j < OUT; j++) {
            float rest = sum_of(sum[m][j]);
            for (long i = k; i < columns; i++) rest += weight[j * columns + i] * x[m * columns + i];
            y[m * LANES + j] = rest;
        }
}

template <int ROWS>
void plain_tile(const Linear& w, long n, const float* x, float* y) {
    const float* weight = (const float*)w.codes + n * LANES * w.columns;
    long j = 0;
    for (; j + 4 <= w.stored(n); j += 4) dots<ROWS, 4>(x, weight + j * w.columns, w.columns, y + j);
    for (; j < w.stored(n); j++) dots<ROWS, 1>(x, weight + j * w.columns, w.columns, y + j);
}

inline void plain(int rows, const Linear& w, long n, const float* x, float* y) {
    int m = 0;
    for (; m + 4 <= rows; m += 4) plain_tile<4>(w, n, x + m * w.columns, y + m * LANES);
    for (; m < rows; m++) plain_tile<1>(w, n, x + m * w.columns, y + m * LANES);
}

// The same of a weight of 4 bits whose rows have their own tables, by stretches of x that stay in the nearest cache.
template <int ROWS, class Stored>
void own_tables(const Linear& w, long n, const float* x, const Stretch& here, float* y) {
    constexpr long INPUTS = LANES * CHUNK, STRETCH = 8192 / ROWS / INPUTS * INPUTS;
    constexpr int SUMS = sums_of(ROWS);
    std::fill(y, y + ROWS * LANES, 0);
    for (long start = 0; start < w.in; start += STRETCH)
        for (long j = 0; j < w.stored(n); j++) {
            const long row = n * LANES + j;
            const uint8_t* p = w.codes + (row * w.in + start) / 2;
            const Stored* scale = (const Stored*)w.scale + row * w.groups() + start / w.width;
            float table[LANES];
            store(table, load((const Stored*)w.table + row * LANES));
            const Four codes(table);
            Floats sum[ROWS][SUMS], step = all(number(*scale++));
            for (auto& row : sum)
                for (auto& one : row) one = zeros();
            long left = (w.width - start % w.width) / LANES;  // sixteens of the group
            for (long k = start; k < std::min<long>(w.in, start + STRETCH); k += INPUTS, p += Four::BYTES) {
                fetch_ahead(p, Four::BYTES, here);
                codes.chunk(p, [&](int i, const Floats& value) {
                    if (left == 0) step = all(number(*scale++)), left = w.width / LANES;
                    left--;
                    const Floats scaled = multiply(value, step);
                    for (int m = 0; m < ROWS; m++)
                        sum[m][i % SUMS] = multiply_add(scaled, load(x + m * w.in + k + i * LANES), sum[m][i % SUMS]);
                });
            }
            for (int m = 0; m < ROWS; m++) {
                for (int i = 1; i < SUMS; i++) sum[m][0] = add(sum[m][0], sum[m][i]);
                y[m * LANES + j] += sum_of(sum[m][0]);
            }
        }
}

template <class Stored, int ROWS = TILE>
void own_tile(int rows, const Linear& w, long n, const float* x, const Stretch& here, float* y) {
    if constexpr (ROWS > 0) {
        if (rows < ROWS) own_tile<Stored, ROWS - 1>(rows, w, n, x, here, y);
        else own_tables<ROWS, Stored>(w, n, x, here, y);
    }
}

// y (rows, 16), rows up to TILE: the products of rows first, first + 1, ... with panel n, and the bias.
inline void product(const Linear& w, long n, const Input& input, long first, int rows, const Stretch& here, float* y) {
    if (w.bits == 32) plain(rows, w, n, input.x + first * w.in, y);
    else if (w.own && w.half) own_tile<uint16_t>(rows, w, n, input.x + first * w.in, here, y);
    else if (w.own) own_tile<float>(rows, w, n, input.x + first * w.in, here, y);
    else if (w.bits == 4 && w.half) tile<Four, uint16_t>(rows, w, n, input, first, here, y);
    else if (w.bits == 4) tile<Four, float>(rows, w, n, input, first, here, y);
    else if (w.half) tile<Eight, uint16_t>(rows, w, n, input, first, here, y);
    else tile<Eight, float>(rows, w, n, input, first, here, y);
    for (int m = 0; w.bias && m < rows; m++)
        for (long j = 0; j < w.stored(n); j++) y[m * LANES + j] += w.bias[n * LANES + j];
}

// Calls each(n, first, rows, y) with the products of panels from..to, tile after tile of rows. Panels are taken in blocks
// that stay in the core's own cache while all rows pass. `next` is what this thread reads after them.
template <class Each>
void products(const Linear& w, long from, long to, const Input& input, const uint8_t* next, Each each) {
    const long bytes = std::max<long>(1, w.in * LANES * w.bits / 8), block = std::max(1L, (256L << 10) / bytes);
    const Stretch here = {w.codes_of(to), next};
    float y[TILE * LANES];
    for (long start = from; start < to; start += block)
        for (long first = 0; first < input.rows; first += TILE) {
            const int rows = std::min<long>(TILE, input.rows - first);
            for (long n = start; n < std::min(to, start + block); n++) {
                product(w, n, input, first, rows, here, y);
                each(n, first, rows, y);
            }
        }
}

}  // namespace
