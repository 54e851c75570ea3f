// A whole step of decoding: one new token for each of several sequences, through all layers of a Llama-family model.
//
// All threads run the same code and share out the panels of each product and the heads of attention. What each needs whole,
// the normed rows, each computes for itself: that is cheaper than waiting for another. They wait for each other five times a
// layer. Nothing but float32 is computed with; the caller looks up the embedding.

#pragma once
#include <omp.h>

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
    float *keys, *values;  // (layers, slots, kv_heads, length, head_dim)
    int64_t slots, length;
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

// out (size,): the values that a query's softmax over keys first..last mixes. keys and values (length, size).
inline void attend(const float* query, const float* keys, const float* values, long first, long last, long size, float* scores,
                   float* out) {
    const float scale = 1 / std::sqrt(float(size));
    float largest = -INFINITY;
    for (long s = first; s <= last; s++) {
        float dot = 0;
        const float* key = keys + s * size;
#pragma omp simd reduction(+ : dot)
        for (long i = 0; i < size; i++) dot += query[i] * key[i];
        scores[s] = dot * scale;
        largest = std::max(largest, scores[s]);
    }
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long s = first; s <= last; s++) sum += scores[s] = exp_of(scores[s] - largest);
    for (long i = 0; i < size; i++) out[i] = 0;
    for (long s = first; s <= last; s++) {
        const float* value = values + s * size;
        const float share = scores[s] / sum;
#pragma omp simd
        for (long i = 0; i < size; i++) out[i] += share * value[i];
    }
}

// x (rows, hidden): the new tokens' embeddings on the way in. logits (rows, vocab). Row r continues the sequence in slot
// slots[r] of the cache, where its token stands at positions[r]; no two rows share a slot.
inline void step(const Model& model, const Cache& cache, const int64_t* slots, const int64_t* positions, float* x, float* logits,
                 long rows, int threads) {
    const long hidden = model.hidden, size = model.head_dim, half = size / 2, group = model.heads / model.kv_heads;
    const long q_size = model.heads * size, kv_size = model.kv_heads * size;
    std::vector<float> q(rows * q_size), k(rows * kv_size), v(rows * kv_size), mixed(rows * q_size);
    std::vector<float> inner(rows * model.intermediate), cos(rows * half), sin(rows * half);
    for (long i = 0; i < rows * half; i++) {
        const float angle = positions[i / half] * model.inverse_frequencies[i % half];
        cos[i] = std::cos(angle), sin[i] = std::sin(angle);
    }

#pragma omp parallel num_threads(threads)
    {
        const long parts = omp_get_num_threads(), part = omp_get_thread_num();
        std::vector<float> normed(rows * hidden), scores(cache.length);
        const auto norm = [&](const float* weight) {
            for (long m = 0; m < rows; m++) rms_norm(&x[m * hidden], weight, hidden, model.eps, &normed[m * hidden]);
        };
        // This thread's share of a product, given to `put` number by number: put(row, output, value).
        const auto share = [&](const Linear& w, const float* given, auto put) {
            const Input input(w, given, rows);
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
            share(layer.q, normed.data(), into(q.data(), q_size));
            share(layer.k, normed.data(), into(k.data(), kv_size));
            share(layer.v, normed.data(), into(v.data(), kv_size));
#pragma omp barrier
            for (long unit = part; unit < rows * model.kv_heads; unit += parts) {
                const long m = unit / model.kv_heads, h = unit % model.kv_heads, at = positions[m];
                const float *turn = &cos[m * half], *turn_sin = &sin[m * half];
                const long place = ((l * cache.slots + slots[m]) * model.kv_heads + h) * cache.length * size;
                float *keys = cache.keys + place, *values = cache.values + place, *key = &k[m * kv_size + h * size];
                if (layer.k_norm) rms_norm(key, layer.k_norm, size, model.eps, key);
                rotate(key, turn, turn_sin, half);
                std::memcpy(keys + at * size, key, size * sizeof(float));
                std::memcpy(values + at * size, &v[m * kv_size + h * size], size * sizeof(float));
                const long first = layer.window ? std::max<long>(0, at - layer.window + 1) : 0;
                for (long i = h * group; i < (h + 1) * group; i++) {
                    float* query = &q[m * q_size + i * size];
                    if (layer.q_norm) rms_norm(query, layer.q_norm, size, model.eps, query);
                    rotate(query, turn, turn_sin, half);
                    attend(query, keys, values, first, at, size, scores.data(), &mixed[m * q_size + i * size]);
                }
            }
#pragma omp barrier
            share(layer.o, mixed.data(), onto_x);
#pragma omp barrier
            norm(layer.post_norm);
            share(layer.gate, normed.data(), into(inner.data(), model.intermediate));
            share(layer.up, normed.data(), [&](long m, long n, float value) {
                float& gate = inner[m * model.intermediate + n];  // its panel is this thread's too
                gate = gate / (1 + exp_of(-gate)) * value;
            });
#pragma omp barrier
            share(layer.down, inner.data(), onto_x);
#pragma omp barrier
        }
        norm(model.norm);
        share(model.head, normed.data(), into(logits, model.head.out));
    }
}

}  // namespace
