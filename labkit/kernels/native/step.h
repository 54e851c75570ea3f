// A step: new tokens of several sequences, one of each or a stretch of one, through all layers of a Llama-family model.
//
// All threads run the same code and share out the panels of each product and the heads of attention. What each needs whole,
// the normed rows, each computes for itself: that is cheaper than waiting for another. They wait for each other six times a
// layer, and once more where its model is a rotated one. Between products nothing but float32 is computed with; the caller
// looks up the embedding.

#pragma once
#include <omp.h>

#include <atomic>
#include <optional>
#include <thread>

#include "pages.h"
#include "product.h"

namespace {

// x -> (x before) H after, block by block: what models/rotate.py has left to be done online. H is `matrix`, which is over the
// root of the block, by Sylvester's of order `power`.
struct Turn {
    int64_t base, power;          // whose product is a block; 0: there is nothing to turn
    const float* matrix;          // (base, base)
    const float *before, *after;  // (size,) of 1 and -1, or null
};

struct Layer {
    const float *input_norm, *post_norm;  // (hidden,)
    const float *q_norm, *k_norm;         // (head_dim,), or null
    Linear q, k, v, o, gate, up, down;
    int64_t window;  // how many tokens back a token sees, itself included; 0: all
    Turn mix;        // of what down reads
};

struct Model {
    int64_t layers, hidden, heads, kv_heads, head_dim, intermediate;
    float eps;
    const float* inverse_frequencies;  // (head_dim / 2,)
    const float* norm;                 // (hidden,)
    const Layer* layer;
    Linear head;
    Turn leave;  // of what the last norm reads
};

struct Cache {
    Kept keys, values;
};

// Where the threads of a step wait for each other. OpenMP's own barrier puts threads to sleep as soon as the process has more
// of them than processors, which it has when two Python threads have computed: waking one takes longer than a product.
class Barrier {
public:
    explicit Barrier(int threads) : threads_(threads) {}
    void wait() {
        const int phase = phase_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
            arrived_.store(0, std::memory_order_relaxed);
            phase_.store(phase + 1, std::memory_order_release);
            return;
        }
        for (int turn = 0; phase_.load(std::memory_order_acquire) == phase; turn++)
            if (turn > PATIENCE) std::this_thread::yield();  // somebody else may need this processor
    }

private:
    static constexpr int PATIENCE = 20000;  // tens of microseconds
    const int threads_;
    std::atomic<int> arrived_{0}, phase_{0};
};

inline void rms_norm(const float* x, const float* weight, long size, float eps, float* y) {
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (long i = 0; i < size; i++) squares += x[i] * x[i];
    const float factor = 1 / std::sqrt(squares / size + eps);
#pragma omp simd
    for (long i = 0; i < size; i++) y[i] = x[i] * factor * weight[i];
}

// x (size,), turned where it lies.
inline void turn(const Turn& by, long size, float* x) {
    const long half = by.power / 2, block = by.base * by.power;
    std::vector<float> room(block);
    for (long i = 0; by.before && i < size; i++) x[i] *= by.before[i];
    for (float* here = x; here < x + size; here += block) {
        std::fill(room.begin(), room.end(), 0);
        for (long row = 0; row < by.base; row++)
            for (long from = 0; from < by.base; from++)
#pragma omp simd
                for (long i = 0; i < by.power; i++) room[row * by.power + i] += by.matrix[from * by.base + row] * here[from * by.power + i];
        float *from = room.data(), *to = here;
        // Sylvester's is the product of one step for each bit of an index. Each takes the lowest bit and leaves it as the
        // highest, so that after all of them every bit is where it was, and no step has to move single numbers.
        for (long done = 1; done < by.power; done *= 2, std::swap(from, to))
            for (long row = 0; row < block; row += by.power)
#pragma omp simd
                for (long i = 0; i < half; i++) {
                    const float a = from[row + 2 * i], b = from[row + 2 * i + 1];
                    to[row + i] = a + b, to[row + half + i] = a - b;
                }
        if (from != here) std::memcpy(here, from, block * sizeof(float));
    }
    for (long i = 0; by.after && i < size; i++) x[i] *= by.after[i];
}

// Each pair (channel i, channel i + half) turned by its angle.
inline void rotate(float* x, const float* cos, const float* sin, long half) {
#pragma omp simd
    for (long i = 0; i < half; i++) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cos[i] - b * sin[i];
        x[i + half] = b * cos[i] + a * sin[i];
    }
}

// One head's query for one token, which sees the positions first..last of its sequence.
struct Query {
    float* numbers;  // (size,)
    long first, last;
    float* out;  // (size,): the values that its softmax over the keys mixes
};

constexpr int QUERIES = 4;  // that share what is loaded of keys and values

// scores (COUNT, stride): the queries times the keys of the pages that stand in table from..to.
template <int COUNT, class Stored>
void multiply_keys(const Query* queries, const Pages& keys, const int32_t* table, long from, long to, float* scores, long stride) {
    constexpr int SUMS = sums_of(COUNT);
    const Floats factor = all(1 / std::sqrt(float(keys.size)));
    const long ahead = keys.ahead<Stored>();
    for (long p = from; p <= to; p++) {
        const uint8_t *page = keys.codes<Stored>(table[p]), *next = keys.codes<Stored>(table[std::min(p + ahead, to)]);
        Floats total[COUNT];
        for (auto& one : total) one = zeros();
        for (long i = 0, group = 0; i < keys.size; group++) {
            const long end = std::min(keys.size, i + keys.width);
            const Floats offset = Stored::CODES ? keys.offset(table[p], group) : zeros();
            Floats sum[COUNT][SUMS];
            for (auto& row : sum)
                for (auto& one : row) one = zeros();
            const auto multiply_by = [&](int which) {
                fetch(next + i * 2 * Stored::BITS);
                Floats numbers = Stored::load(page, i);
                if (Stored::CODES) numbers = add(numbers, offset);
                for (int j = 0; j < COUNT; j++) sum[j][which] = multiply_add(numbers, all(queries[j].numbers[i]), sum[j][which]);
                i++;
            };
            while (i + SUMS <= end)
                for (int which = 0; which < SUMS; which++) multiply_by(which);
            while (i < end) multiply_by(0);
            const Floats scale = Stored::CODES ? keys.scale(table[p], group) : all(1);
            for (int j = 0; j < COUNT; j++) {
                for (int which = 1; which < SUMS; which++) sum[j][0] = add(sum[j][0], sum[j][which]);
                total[j] = multiply_add(sum[j][0], scale, total[j]);
            }
        }
        for (int j = 0; j < COUNT; j++) store(scores + j * stride + p * LANES, multiply(total[j], factor));
    }
}

// Adds to the sums (size, COUNT, 16), of which each lane has those of its own tokens: the values of the PAGES pages that stand in
// table from p on, each times its weight of (COUNT, stride). `last` is the last page that will be wanted.
template <int COUNT, int PAGES, class Stored>
void mix_values(const Pages& values, const int32_t* table, long p, long last, const float* weights, long stride, float* sums) {
    const uint8_t *page[PAGES], *next[PAGES];
    const long ahead = values.ahead<Stored>();
    for (int k = 0; k < PAGES; k++) {
        page[k] = values.codes<Stored>(table[p + k]);
        next[k] = values.codes<Stored>(table[std::min(p + k + ahead, last)]);
    }
    for (long i = 0, group = 0; i < values.size; group++) {
        Floats weight[PAGES][COUNT], offset[PAGES];
        for (int k = 0; k < PAGES; k++) {
            for (int j = 0; j < COUNT; j++) {
                weight[k][j] = load(weights + j * stride + (p + k) * LANES);
                if (Stored::CODES) weight[k][j] = multiply(weight[k][j], values.scale(table[p + k], group));
            }
            if (Stored::CODES) offset[k] = values.offset(table[p + k], group);
        }
        for (const long end = std::min(values.size, i + values.width); i < end; i++) {
            Floats sum[COUNT];
            for (int j = 0; j < COUNT; j++) sum[j] = load(sums + (i * COUNT + j) * LANES);
            for (int k = 0; k < PAGES; k++) {
                fetch(next[k] + i * 2 * Stored::BITS);
                Floats numbers = Stored::load(page[k], i);
                if (Stored::CODES) numbers = add(numbers, offset[k]);
                for (int j = 0; j < COUNT; j++) sum[j] = multiply_add(numbers, weight[k][j], sum[j]);
            }
            for (int j = 0; j < COUNT; j++) store(sums + (i * COUNT + j) * LANES, sum[j]);
        }
    }
}

// Keys and values of one head as one sequence's attention finds them.
struct Seen {
    const Cache& cache;
    const Pages keys, values;
    const int32_t* table;  // the sequence's pages, in order
};

// Room for the scores of QUERIES queries, (QUERIES, stride), and for the sums of values that belong to them.
struct Room {
    const long stride;
    std::vector<float> scores, sums;
    Room(long pages, long size) : stride(pages * LANES), scores(QUERIES * stride), sums(QUERIES * size * LANES) {}
};

template <int COUNT>
void attend(const Query* queries, const Seen& seen, Room& room) {
    const long size = seen.keys.size, stride = room.stride;
    float *scores = room.scores.data(), *sums = room.sums.data();
    long from = queries[0].first, to = queries[0].last;
    for (int j = 1; j < COUNT; j++) from = std::min(from, queries[j].first), to = std::max(to, queries[j].last);
    from /= LANES, to /= LANES;
    with_format(seen.cache.keys.format, [&](auto stored) {
        multiply_keys<COUNT, decltype(stored)>(queries, seen.keys, seen.table, from, to, scores, stride);
    });
    float factors[COUNT];
    for (int j = 0; j < COUNT; j++) {
        float *score = scores + j * stride, largest = -INFINITY, sum = 0;
        const long first = queries[j].first, last = queries[j].last;
#pragma omp simd reduction(max : largest)
        for (long s = first; s <= last; s++) largest = std::max(largest, score[s]);
#pragma omp simd reduction(+ : sum)
        for (long s = first; s <= last; s++) sum += score[s] = exp_of(score[s] - largest);
        std::fill(score + from * LANES, score + first, 0);  // what others see and it does not, or nobody
        std::fill(score + last + 1, score + (to + 1) * LANES, 0);
        factors[j] = 1 / sum;
    }
    std::fill(sums, sums + size * COUNT * LANES, 0);
    with_format(seen.cache.values.format, [&](auto stored) {
        long p = from;
        for (; p + 4 <= to + 1; p += 4)
            mix_values<COUNT, 4, decltype(stored)>(seen.values, seen.table, p, to, scores, stride, sums);
        for (; p <= to; p++) mix_values<COUNT, 1, decltype(stored)>(seen.values, seen.table, p, to, scores, stride, sums);
    });
    for (int j = 0; j < COUNT; j++)
        for (long i = 0; i < size; i++) queries[j].out[i] = sum_of(load(sums + (i * COUNT + j) * LANES)) * factors[j];
}

template <int COUNT = QUERIES>
void attend(int count, const Query* queries, const Seen& seen, Room& room) {
    if constexpr (COUNT > 0) {
        if (count < COUNT) attend<COUNT - 1>(count, queries, seen, room);
        else attend<COUNT>(queries, seen, room);
    }
}

// Some of the queries that share a head of keys: those `first`, `first` + 1, ... of the rows row..row + rows - 1 of one sequence,
// each of which has `group` of them.
struct Share {
    long row, head, first;
    int count;
};

inline std::vector<Share> shares_of(long rows, long each, long kv_heads, long group) {
    std::vector<Share> shares;
    for (long row = 0; row < rows; row += each)
        for (long first = 0; first < each * group; first += QUERIES)
            for (long head = 0; head < kv_heads; head++)
                shares.push_back({row, head, first, int(std::min<long>(QUERIES, each * group - first))});
    return shares;
}

// x (rows, hidden): the new tokens' embeddings on the way in, of `count` sequences as many each, whose pages stand in table (count,
// pages). Row r's token stands at positions[r] of its sequence. logits (count, vocab) of the rows wanted[0], wanted[1], ...
inline void step(const Model& model, const Cache& cache, const int32_t* table, long pages, const int64_t* positions, float* x,
                 long rows, const int64_t* wanted, long count, float* logits, int threads) {
    const long hidden = model.hidden, size = model.head_dim, half = size / 2, group = model.heads / model.kv_heads;
    const long q_size = model.heads * size, kv_size = model.kv_heads * size;
    std::vector<float> q(rows * q_size), k(rows * kv_size), v(rows * kv_size), mixed(rows * q_size);
    const long each = rows / count;
    const std::vector<Share> shares = shares_of(rows, each, model.kv_heads, group);
    std::optional<Barrier> barrier;
    std::vector<float> inner(rows * model.intermediate), cos(rows * half), sin(rows * half);
    for (long i = 0; i < rows * half; i++) {
        const float angle = positions[i / half] * model.inverse_frequencies[i % half];
        cos[i] = std::cos(angle), sin[i] = std::sin(angle);
    }

#pragma omp parallel num_threads(threads)
    {
        const long parts = omp_get_num_threads(), part = omp_get_thread_num();
#pragma omp single
        barrier.emplace(parts);
        std::vector<float> normed(rows * hidden);
        Room room(pages, size);
        Input input;
        const float* last = nullptr;
        const auto norm = [&](const float* weight) {
            for (long m = 0; m < rows; m++) rms_norm(&x[m * hidden], weight, hidden, model.eps, &normed[m * hidden]);
        };
        // This thread's share of a product, given to `put` as it comes: put(row, first output, how many, their values).
        // `given` is null where it is what the last product was given.
        const auto share = [&](const Linear& w, const float* given, long rows, auto put) {
            if (given) last = given;
            if (given || !input.fits(w)) input.take(w, last, rows);
            const long panels = w.panels();
            products(w, panels * part / parts, panels * (part + 1) / parts, input,
                     [&](long n, long first, int count, const float* y) {
                         for (int m = 0; m < count; m++) put(first + m, n * LANES, w.stored(n), y + m * LANES);
                     });
        };
        const auto into = [](float* y, long out) {
            return [y, out](long m, long n, long count, const float* values) {
                std::memcpy(y + m * out + n, values, count * sizeof(float));
            };
        };
        const auto onto_x = [&](long m, long n, long count, const float* values) {
            float* sums = x + m * hidden + n;
#pragma omp simd
            for (long j = 0; j < count; j++) sums[j] += values[j];
        };

        for (long l = 0; l < model.layers; l++) {
            const Layer& layer = model.layer[l];
            norm(layer.input_norm);
            share(layer.q, normed.data(), rows, into(q.data(), q_size));
            share(layer.k, nullptr, rows, into(k.data(), kv_size));
            share(layer.v, nullptr, rows, into(v.data(), kv_size));
            barrier->wait();
            const auto seen_by = [&](long m, long h) {  // what row m sees with its head h
                const auto pages_of = [&](const Kept& kept) { return Pages(kept, l, model.kv_heads, h, size); };
                return Seen{cache, pages_of(cache.keys), pages_of(cache.values), table + m / each * pages};
            };
            const auto keep = [&](const Kept& kept, const Pages& pages, int32_t page, long lane, const float* x) {
                with_format(kept.format, [&](auto stored) { pages.keep<decltype(stored)>(page, lane, x); });
            };
            for (long unit = part; unit < rows * model.kv_heads; unit += parts) {
                const long m = unit / model.kv_heads, h = unit % model.kv_heads, at = positions[m];
                float* key = &k[m * kv_size + h * size];
                if (layer.k_norm) rms_norm(key, layer.k_norm, size, model.eps, key);
                rotate(key, &cos[m * half], &sin[m * half], half);
                const Seen seen = seen_by(m, h);
                const int32_t page = seen.table[at / LANES];
                keep(cache.keys, seen.keys, page, at % LANES, key);
                keep(cache.values, seen.values, page, at % LANES, &v[m * kv_size + h * size]);
            }
            barrier->wait();
            for (size_t unit = part; unit < shares.size(); unit += parts) {
                const Share& some = shares[unit];
                Query queries[QUERIES];
                for (int j = 0; j < some.count; j++) {
                    const long m = some.row + (some.first + j) / group, i = some.head * group + (some.first + j) % group;
                    float* query = &q[m * q_size + i * size];
                    if (layer.q_norm) rms_norm(query, layer.q_norm, size, model.eps, query);
                    rotate(query, &cos[m * half], &sin[m * half], half);
                    const long first = layer.window ? std::max<long>(0, positions[m] - layer.window + 1) : 0;
                    queries[j] = {query, first, positions[m], &mixed[m * q_size + i * size]};
                }
                attend(some.count, queries, seen_by(some.row, some.head), room);
            }
            barrier->wait();
            share(layer.o, mixed.data(), rows, onto_x);
            barrier->wait();
            norm(layer.post_norm);
            share(layer.gate, normed.data(), rows, into(inner.data(), model.intermediate));
            share(layer.up, nullptr, rows, [&](long m, long n, long count, const float* values) {
                float* gate = &inner[m * model.intermediate + n];  // its panel is this thread's too
#pragma omp simd
                for (long j = 0; j < count; j++) gate[j] = gate[j] / (1 + exp_of(-gate[j])) * values[j];
            });
            barrier->wait();
            if (layer.mix.base) {
                for (long m = part; m < rows; m += parts) turn(layer.mix, model.intermediate, &inner[m * model.intermediate]);
                barrier->wait();
            }
            share(layer.down, inner.data(), rows, onto_x);
            barrier->wait();
        }
        for (long m = 0; m < count; m++) {
            float* row = &normed[m * hidden];
            std::memcpy(row, x + wanted[m] * hidden, hidden * sizeof(float));
            if (model.leave.base) turn(model.leave, hidden, row);
            rms_norm(row, model.norm, hidden, model.eps, row);
        }
        share(model.head, normed.data(), count, into(logits, model.head.out));
    }
}

}  // namespace
