// A step: new tokens of several sequences, one of each or a stretch of one, through all layers of a Llama-family model.
//
// All threads run the same code and share out the panels of each product and the heads of attention. What each needs whole,
// the normed rows, each computes for itself: that is cheaper than waiting for another. They wait for each other six times a
// layer. Between products nothing but float32 is computed with; the caller looks up the embedding.

#pragma once
#include <omp.h>

#include <atomic>
#include <optional>
#include <thread>

#include "product.h"

namespace {

struct Layer {
    const float *input_norm, *post_norm;  // (hidden,)
    const float *q_norm, *k_norm;         // (head_dim,), or null
    Linear q, k, v, o, gate, up, down;
    int64_t window;  // how many tokens back a token sees, itself included; 0: all
};

struct Model {
    int64_t layers, hidden, heads, kv_heads, head_dim, intermediate;
    float eps;
    const float* inverse_frequencies;  // (head_dim / 2,)
    const float* norm;                 // (hidden,)
    const Layer* layer;
    Linear head;
};

struct Cache {
    void *keys, *values;  // (layers, slots, kv_heads, length, head_dim)
    int64_t slots, length;
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

// Each pair (channel i, channel i + half) turned by its angle.
inline void rotate(float* x, const float* cos, const float* sin, long half) {
#pragma omp simd
    for (long i = 0; i < half; i++) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cos[i] - b * sin[i];
        x[i + half] = b * cos[i] + a * sin[i];
    }
}

template <class Stored>
float dot(const float* a, const Stored* b, long size) {
    Floats sum[2] = {zeros(), zeros()};
    long i = 0;
    for (; i + 2 * LANES <= size; i += 2 * LANES)
        for (int j = 0; j < 2; j++) sum[j] = multiply_add(load(a + i + j * LANES), load(b + i + j * LANES), sum[j]);
    float rest = sum_of(add(sum[0], sum[1]));
    for (; i < size; i++) rest += a[i] * number(b[i]);
    return rest;
}

// out (VECTORS * 16,): the sum of weights (last + 1,) times rows first..last of values, of which one is `size` long.
template <int VECTORS, class Stored>
void mix(const float* weights, const Stored* values, long first, long last, long size, float factor, float* out) {
    Floats sum[VECTORS][2];
    for (auto& pair : sum) pair[0] = pair[1] = zeros();
    const auto row = [&](long s, int which) {
        fetch_ahead(values + s * size, VECTORS * LANES * sizeof(Stored));
        const Floats weight = all(weights[s]);
        for (int i = 0; i < VECTORS; i++) sum[i][which] = multiply_add(weight, load(values + s * size + i * LANES), sum[i][which]);
    };
    long s = first;
    for (; s < last; s += 2) row(s, 0), row(s + 1, 1);
    if (s == last) row(s, 0);
    for (int i = 0; i < VECTORS; i++) store(out + i * LANES, multiply(add(sum[i][0], sum[i][1]), all(factor)));
}

// out (size,): the values that a query's softmax over keys first..last mixes. keys and values (length, size).
template <class Stored>
void attend(const float* query, const Stored* keys, const Stored* values, long first, long last, long size, float* scores, float* out) {
    const float scale = 1 / std::sqrt(float(size));
    float largest = -INFINITY;
    for (long s = first; s <= last; s++) {
        fetch_ahead(keys + s * size, size * sizeof(Stored));
        scores[s] = dot(query, keys + s * size, size) * scale;
        largest = std::max(largest, scores[s]);
    }
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long s = first; s <= last; s++) sum += scores[s] = exp_of(scores[s] - largest);
    const float factor = 1 / sum;
    long i = 0;
    for (; i + 4 * LANES <= size; i += 4 * LANES) mix<4>(scores, values + i, first, last, size, factor, out + i);
    for (; i + LANES <= size; i += LANES) mix<1>(scores, values + i, first, last, size, factor, out + i);
    for (; i < size; i++) {
        float mixed = 0;
        for (long s = first; s <= last; s++) mixed += scores[s] * number(values[s * size + i]);
        out[i] = mixed * factor;
    }
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
        std::vector<float> normed(rows * hidden), scores(cache.length);
        Input input;
        const auto norm = [&](const float* weight) {
            for (long m = 0; m < rows; m++) rms_norm(&x[m * hidden], weight, hidden, model.eps, &normed[m * hidden]);
        };
        // This thread's share of a product, given to `put` number by number: put(row, output, value).
        const auto share = [&](const Linear& w, const float* given, long rows, auto put) {
            input.take(w, given, rows);
            const long panels = w.panels();
            products(w, panels * part / parts, panels * (part + 1) / parts, input,
                     [&](long n, long first, int count, const float* y) {
                         for (int m = 0; m < count; m++)
                             for (long j = 0; j < w.stored(n); j++) put(first + m, n * LANES + j, y[m * LANES + j]);
                     });
        };
        const auto into = [](float* y, long out) {
            return [y, out](long m, long n, float value) { y[m * out + n] = value; };
        };
        const auto onto_x = [&](long m, long n, float value) { x[m * hidden + n] += value; };

        for (long l = 0; l < model.layers; l++) {
            const Layer& layer = model.layer[l];
            norm(layer.input_norm);
            share(layer.q, normed.data(), rows, into(q.data(), q_size));
            share(layer.k, normed.data(), rows, into(k.data(), kv_size));
            share(layer.v, normed.data(), rows, into(v.data(), kv_size));
            barrier->wait();
            const auto head = [&](long m, long h) {  // where the cache has what row m sees with its head h
                return ((l * cache.slots + slots[m]) * model.kv_heads + h) * cache.length * size;
            };
            for (long unit = part; unit < rows * model.kv_heads; unit += parts) {
                const long m = unit / model.kv_heads, h = unit % model.kv_heads, place = head(m, h) + positions[m] * size;
                float* key = &k[m * kv_size + h * size];
                if (layer.k_norm) rms_norm(key, layer.k_norm, size, model.eps, key);
                rotate(key, &cos[m * half], &sin[m * half], half);
                keep(key, size, all_keys + place);
                keep(&v[m * kv_size + h * size], size, all_values + place);
            }
            barrier->wait();
            for (long unit = part; unit < rows * model.heads; unit += parts) {
                const long m = unit / model.heads, i = unit % model.heads, place = head(m, i / group), at = positions[m];
                float* query = &q[m * q_size + i * size];
                if (layer.q_norm) rms_norm(query, layer.q_norm, size, model.eps, query);
                rotate(query, &cos[m * half], &sin[m * half], half);
                const long first = layer.window ? std::max<long>(0, at - layer.window + 1) : 0;
                attend(query, all_keys + place, all_values + place, first, at, size, scores.data(), &mixed[m * q_size + i * size]);
            }
            barrier->wait();
            share(layer.o, mixed.data(), rows, onto_x);
            barrier->wait();
            norm(layer.post_norm);
            share(layer.gate, normed.data(), rows, into(inner.data(), model.intermediate));
            share(layer.up, normed.data(), rows, [&](long m, long n, float value) {
                float& gate = inner[m * model.intermediate + n];  // its panel is this thread's too
                gate = gate / (1 + exp_of(-gate)) * value;
            });
            barrier->wait();
            share(layer.down, inner.data(), rows, onto_x);
            barrier->wait();
        }
        for (long m = 0; m < count; m++)
            rms_norm(&x[wanted[m] * hidden], model.norm, hidden, model.eps, &normed[m * hidden]);
        share(model.head, normed.data(), count, into(logits, model.head.out));
    }
}

}  // namespace
