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
    void* keys;    // (layers, slots, kv_heads, panels, head_dim, 16): keys 0 to 15 number by number, then the next
    void* values;  // (layers, slots, kv_heads, length, head_dim)
    int64_t slots, panels, length;
    int32_t half;  // they are float16, else float32
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

// scores (COUNT, stride): the queries times the keys of panels from..to, each of which is (size, 16).
template <int COUNT, class Stored>
void multiply_keys(const Query* queries, const Stored* keys, long from, long to, long size, float* scores, long stride) {
    constexpr int SUMS = sums_of(COUNT);
    const Floats scale = all(1 / std::sqrt(float(size)));
    for (long panel = from; panel <= to; panel++) {
        Floats sum[COUNT][SUMS];
        for (auto& row : sum)
            for (auto& one : row) one = zeros();
        const Stored* key = keys + panel * size * LANES;
        long i = 0;
        const auto multiply_by = [&](int which) {
            fetch_ahead(key + i * LANES, LANES * sizeof(Stored));
            const Floats numbers = load(key + i * LANES);
            for (int j = 0; j < COUNT; j++) sum[j][which] = multiply_add(numbers, all(queries[j].numbers[i]), sum[j][which]);
            i++;
        };
        while (i + SUMS <= size)
            for (int which = 0; which < SUMS; which++) multiply_by(which);
        while (i < size) multiply_by(0);
        for (int j = 0; j < COUNT; j++) {
            for (int which = 1; which < SUMS; which++) sum[j][0] = add(sum[j][0], sum[j][which]);
            store(scores + j * stride + panel * LANES, multiply(sum[j][0], scale));
        }
    }
}

// Writes VECTORS * 16 numbers of each query's result: the sums of its weights, (COUNT, stride), times rows from..to of values, of
// which one is `size` long, times its factor.
template <int COUNT, int VECTORS, class Stored>
void mix_values(const Query* queries, const float* weights, long stride, const Stored* values, long from, long to, long size,
                const float* factors, long at) {
    Floats sum[COUNT][VECTORS];
    for (auto& row : sum)
        for (auto& one : row) one = zeros();
    for (long s = from; s <= to; s++) {
        const Stored* value = values + s * size + at;
        fetch_ahead(value, VECTORS * LANES * sizeof(Stored));
        Floats numbers[VECTORS];
        for (int i = 0; i < VECTORS; i++) numbers[i] = load(value + i * LANES);
        for (int j = 0; j < COUNT; j++)
            for (int i = 0; i < VECTORS; i++) sum[j][i] = multiply_add(all(weights[j * stride + s]), numbers[i], sum[j][i]);
    }
    for (int j = 0; j < COUNT; j++)
        for (int i = 0; i < VECTORS; i++) store(queries[j].out + at + i * LANES, multiply(sum[j][i], all(factors[j])));
}

// Attention of COUNT queries over one head's keys, in panels of 16, and values (length, size). scores is room for (COUNT, stride).
template <int COUNT, class Stored>
void attend(const Query* queries, const Stored* keys, const Stored* values, long size, float* scores, long stride) {
    long from = queries[0].first, to = queries[0].last;
    for (int j = 1; j < COUNT; j++) from = std::min(from, queries[j].first), to = std::max(to, queries[j].last);
    multiply_keys<COUNT>(queries, keys, from / LANES, to / LANES, size, scores, stride);
    float factors[COUNT];
    for (int j = 0; j < COUNT; j++) {
        float *score = scores + j * stride, largest = -INFINITY, sum = 0;
        const long first = queries[j].first, last = queries[j].last;
#pragma omp simd reduction(max : largest)
        for (long s = first; s <= last; s++) largest = std::max(largest, score[s]);
#pragma omp simd reduction(+ : sum)
        for (long s = first; s <= last; s++) sum += score[s] = exp_of(score[s] - largest);
        std::fill(score + from, score + first, 0);  // what another of them sees and it does not
        std::fill(score + last + 1, score + to + 1, 0);
        factors[j] = 1 / sum;
    }
    long at = 0;
    for (; at + 4 * LANES <= size; at += 4 * LANES) mix_values<COUNT, 4>(queries, scores, stride, values, from, to, size, factors, at);
    for (; at + LANES <= size; at += LANES) mix_values<COUNT, 1>(queries, scores, stride, values, from, to, size, factors, at);
    for (; at < size; at++)
        for (int j = 0; j < COUNT; j++) {
            float sum = 0;
            for (long s = from; s <= to; s++) sum += scores[j * stride + s] * number(values[s * size + at]);
            queries[j].out[at] = sum * factors[j];
        }
}

template <class Stored, int COUNT = QUERIES>
void attend(int count, const Query* queries, const Stored* keys, const Stored* values, long size, float* scores, long stride) {
    if constexpr (COUNT > 0) {
        if (count < COUNT) attend<Stored, COUNT - 1>(count, queries, keys, values, size, scores, stride);
        else attend<COUNT>(queries, keys, values, size, scores, stride);
    }
}

// Some of the queries that share a head of keys: those `first`, `first` + 1, ... of the rows row..row + rows - 1 of one sequence,
// each of which has `group` of them.
struct Share {
    long row, head, first;
    int count;
};

inline std::vector<Share> shares_of(const int64_t* slots, long rows, long kv_heads, long group) {
    std::vector<Share> shares;
    for (long row = 0, end; row < rows; row = end) {
        for (end = row + 1; end < rows && slots[end] == slots[row];) end++;
        for (long first = 0; first < (end - row) * group; first += QUERIES)
            for (long head = 0; head < kv_heads; head++)
                shares.push_back({row, head, first, int(std::min<long>(QUERIES, (end - row) * group - first))});
    }
    return shares;
}

// x (rows, hidden): the new tokens' embeddings on the way in. Row r continues the sequence in slot slots[r] of the cache, where
// its token stands at positions[r]. logits (count, vocab) of the rows wanted[0], wanted[1], ...
template <class Stored>
void step(const Model& model, const Cache& cache, const int64_t* slots, const int64_t* positions, float* x, long rows,
          const int64_t* wanted, long count, float* logits, int threads) {
    Stored *const all_keys = (Stored*)cache.keys, *const all_values = (Stored*)cache.values;
    const long hidden = model.hidden, size = model.head_dim, half = size / 2, group = model.heads / model.kv_heads;
    const long q_size = model.heads * size, kv_size = model.kv_heads * size;
    std::vector<float> q(rows * q_size), k(rows * kv_size), v(rows * kv_size), mixed(rows * q_size);
    const std::vector<Share> shares = shares_of(slots, rows, model.kv_heads, group);
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
        const long stride = cache.panels * LANES;
        std::vector<float> normed(rows * hidden), scores(QUERIES * stride);
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
            const auto keys_of = [&](long m, long h) {  // where the cache has what row m sees with its head h
                return all_keys + ((l * cache.slots + slots[m]) * model.kv_heads + h) * stride * size;
            };
            const auto values_of = [&](long m, long h) {
                return all_values + ((l * cache.slots + slots[m]) * model.kv_heads + h) * cache.length * size;
            };
            for (long unit = part; unit < rows * model.kv_heads; unit += parts) {
                const long m = unit / model.kv_heads, h = unit % model.kv_heads, at = positions[m];
                float* key = &k[m * kv_size + h * size];
                if (layer.k_norm) rms_norm(key, layer.k_norm, size, model.eps, key);
                rotate(key, &cos[m * half], &sin[m * half], half);
                Stored* panel = keys_of(m, h) + at / LANES * LANES * size;
                for (long i = 0; i < size; i++) keep(key + i, 1, panel + i * LANES + at % LANES);
                keep(&v[m * kv_size + h * size], size, values_of(m, h) + at * size);
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
                attend<Stored>(some.count, queries, keys_of(some.row, some.head), values_of(some.row, some.head), size,
                               scores.data(), stride);
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
