// A step: new tokens of several sequences, one of each or a stretch of one, through all layers of a Llama-family model.
//
// All threads run the same code and share out the panels of each product and the heads of attention. What each needs whole,
// the normed rows, each computes for itself: that is cheaper than waiting for another. They wait for each other six times a
// layer, and once more where its model is a rotated one. Between products nothing but float32 is computed with.

#pragma once
#include "pages.h"
#include "product.h"
#include "threads.h"

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
    const float* embedding;            // (vocab, hidden)
    const float* norm;                 // (hidden,)
    const Layer* layer;
    Linear head;
    Turn enter, leave;  // of the embedding, and of what the last norm reads
};

struct Cache {
    Kept keys, values;
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
    float* log;  // of the sum of e^score, by which parts of a sequence are weighed against each other
};

// How much of keys and values is asked for before it is needed: pages of each sequence and head; bytes in all, which a core's own
// cache has room for beside weights.
constexpr long PAGES_ASKED = 16, ASKED = 256 << 10;
constexpr int QUERIES = 4;  // that share what is loaded of keys and values

// scores (COUNT, stride): the queries times the keys of the pages that stand in table from..to.
template <int COUNT, class Stored>
__attribute__((noinline)) void multiply_keys(const Query* queries, const Pages& keys, const int32_t* table, long from, long to, float* scores, long stride) {
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
                if (i * 2 * Stored::BITS % 64 == 0) fetch(next + i * 2 * Stored::BITS);
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

// Writes VECTORS * 16 numbers of each query's result, from number `at` on: the sums of its weights (COUNT, stride) times the values
// of the tokens first..last, times its factor. Codes must be of one group.
template <int COUNT, int VECTORS, class Stored>
__attribute__((noinline)) void mix_values(const Query* queries, const Pages& values, const int32_t* table, long first, long last,
                                          const float* weights, long stride, const float* factors, long at) {
    const long ahead = values.ahead<Stored>(), row = values.row<Stored>(), group = at / values.width;
    Floats sum[COUNT][VECTORS], low[COUNT];
    for (int j = 0; j < COUNT; j++) {
        low[j] = zeros();
        for (auto& one : sum[j]) one = zeros();
    }
    for (long p = first / LANES; p <= last / LANES; p++) {
        const uint8_t* token = values.codes<Stored>(table[p]);
        const uint8_t* next = values.codes<Stored>(table[std::min(p + ahead, last / LANES)]) + at * Stored::BITS / 8;
        float weight[COUNT][LANES];
        for (int j = 0; j < COUNT; j++) {
            Floats some = load(weights + j * stride + p * LANES);
            if (Stored::CODES) {
                some = multiply(some, values.scale(table[p], group));
                low[j] = multiply_add(some, values.offset(table[p], group), low[j]);
            }
            store(weight[j], some);
        }
        for (int t = 0; t < LANES; t++, token += row, next += row) {
            for (long line = 0; line < VECTORS * 2 * Stored::BITS; line += 64) fetch(next + line);
            Floats numbers[VECTORS];
            for (int i = 0; i < VECTORS; i++) numbers[i] = Stored::along(token, at + i * LANES);
            for (int j = 0; j < COUNT; j++)
                for (int i = 0; i < VECTORS; i++) sum[j][i] = multiply_add(all(weight[j][t]), numbers[i], sum[j][i]);
        }
    }
    const long count = std::min<long>(VECTORS * LANES, values.size - at);
    for (int j = 0; j < COUNT; j++) {
        float mixed[VECTORS * LANES];
        const Floats all_low = all(Stored::CODES ? sum_of(low[j]) : 0);
        for (int i = 0; i < VECTORS; i++) store(mixed + i * LANES, multiply(add(sum[j][i], all_low), all(factors[j])));
        std::memcpy(queries[j].out + at, mixed, count * sizeof(float));
    }
}

// Keys and values of one head as one sequence's attention finds them.
struct Seen {
    const Cache& cache;
    const Pages keys, values;
    const int32_t* table;  // the sequence's pages, in order
};

// What QUERIES queries need room for: their scores.
struct Room {
    const long stride;
    std::vector<float> scores;  // (QUERIES, stride)
    explicit Room(long pages) : stride(pages * LANES), scores(QUERIES * stride) {}
};

template <int COUNT>
void attend(const Query* queries, const Seen& seen, Room& room) {
    const long size = seen.keys.size, stride = room.stride;
    float* scores = room.scores.data();
    long first = queries[0].first, last = queries[0].last;
    for (int j = 1; j < COUNT; j++) first = std::min(first, queries[j].first), last = std::max(last, queries[j].last);
    const long from = first / LANES, to = last / LANES;
    with_format(seen.cache.keys.format, [&](auto stored) {
        multiply_keys<COUNT, decltype(stored)>(queries, seen.keys, seen.table, from, to, scores, stride);
    });
    float factors[COUNT];
    for (int j = 0; j < COUNT; j++) {
        float *score = scores + j * stride, sum = 0;
        const long mine = queries[j].first, end = queries[j].last + 1;  // none where mine is end or more
        const float largest = largest_of(score + mine, end - mine);
#pragma omp simd reduction(+ : sum)
        for (long s = mine; s < end; s++) sum += score[s] = exp_of(score[s] - largest);
        const bool none = mine >= end;
        std::fill(score + from * LANES, score + (none ? (to + 1) * LANES : mine), 0);  // what others see and it does not, or nobody
        if (!none) std::fill(score + end, score + (to + 1) * LANES, 0);
        factors[j] = none ? 0 : 1 / sum;
        *queries[j].log = none ? -INFINITY : largest + std::log(sum);
    }
    with_format(seen.cache.values.format, [&](auto stored) {
        using Stored = decltype(stored);
        const long width = Stored::CODES ? seen.values.width : size;
        for (long at = 0; at < size;) {
            const bool four = at % width + 4 * LANES <= width && at + 4 * LANES <= size;
            const auto mix = four ? mix_values<COUNT, 4, Stored> : mix_values<COUNT, 1, Stored>;
            mix(queries, seen.values, seen.table, first, last, scores, stride, factors, at);
            at += (four ? 4 : 1) * LANES;
        }
    });
}

template <int COUNT = QUERIES>
void attend(int count, const Query* queries, const Seen& seen, Room& room) {
    if constexpr (COUNT > 0) {
        if (count < COUNT) attend<COUNT - 1>(count, queries, seen, room);
        else attend<COUNT>(queries, seen, room);
    }
}

// Some of the queries that share a head of keys: those `first`, `first` + 1, ... of the rows row..row + rows - 1 of one sequence,
// each of which has `group` of them. They see a piece of what they see in all.
struct Share {
    long row, head, first;
    int count, piece;
};

// Into how many pieces sequences are cut, so that no thread has a tenth more to do than another; short ones are not worth it.
inline int pieces_of(long shares, long threads, long pages) {
    int pieces = 1;
    while (pieces < std::min(8L, pages / 8) && 10 * ((shares * pieces + threads - 1) / threads) * threads > 11 * shares * pieces) pieces++;
    return pieces;
}

inline std::vector<Share> shares_of(long rows, long each, long kv_heads, long group, long threads, long pages, int* pieces) {
    const long shares = rows / each * kv_heads * ((each * group + QUERIES - 1) / QUERIES);
    *pieces = pieces_of(shares, threads, pages);
    std::vector<Share> found;
    for (long row = 0; row < rows; row += each)
        for (long first = 0; first < each * group; first += QUERIES)
            for (long head = 0; head < kv_heads; head++)
                for (int piece = 0; piece < *pieces; piece++)
                    found.push_back({row, head, first, int(std::min<long>(QUERIES, each * group - first)), piece});
    return found;
}

// Cuts down what the queries see to one of so many pieces, whole pages each. One that sees nothing of it has its last before its first.
inline void cut(Query* queries, int count, long piece, long pieces) {
    long first = queries[0].first, last = queries[0].last;
    for (int j = 1; j < count; j++) first = std::min(first, queries[j].first), last = std::max(last, queries[j].last);
    const long from = first / LANES, pages = last / LANES + 1 - from;
    const long begin = (from + pages * piece / pieces) * LANES, end = (from + pages * (piece + 1) / pieces) * LANES;
    for (int j = 0; j < count; j++) queries[j].first = std::max(queries[j].first, begin), queries[j].last = std::min(queries[j].last, end - 1);
}

// The softmax over all pieces: results (pieces, count, size), weighed by e^logs (pieces, count), go to out (count, size).
inline void join(const float* results, const float* logs, long pieces, long count, long size, float* out) {
    std::fill(out, out + count * size, 0);
    for (long i = 0; i < count; i++) {
        float largest = -INFINITY, sum = 0, weights[8];
        for (long p = 0; p < pieces; p++) largest = std::max(largest, logs[p * count + i]);
        for (long p = 0; p < pieces; p++) sum += weights[p] = std::exp(logs[p * count + i] - largest);
        for (long p = 0; p < pieces; p++) {
            const float *result = results + (p * count + i) * size, weight = weights[p] / sum;
#pragma omp simd
            for (long n = 0; n < size; n++) out[i * size + n] += weight * result[n];
        }
    }
}

// The largest of some numbers and where it stands first; nowhere, -1, where one of them is no number or infinite.
struct Top {
    float value = -INFINITY;
    long at = -1;
};

inline Top top_of(const float* x, long first, long end) {
    constexpr long BLOCK = 512;
    Top top;
    float strange = 0;
    for (long begin = first; begin < end; begin += BLOCK) {
        float largest = -INFINITY;
#pragma omp simd reduction(max : largest) reduction(+ : strange)
        for (long i = begin; i < std::min(begin + BLOCK, end); i++) largest = std::max(largest, x[i]), strange += x[i] * 0;
        if (largest > top.value) top = {largest, begin};
    }
    if (strange != 0) return {INFINITY, -1};  // whatever the others have
    while (top.at >= 0 && x[top.at] != top.value) top.at++;
    return top;
}

// tokens (rows,): the new ones of `count` sequences, as many each, whose pages stand in table (count, pages) and who have starts
// (count,) tokens already. logits (count, vocab) of each sequence's last token, likeliest (count,) where its largest stands: top_of.
inline void step(const Model& model, const Cache& cache, const int32_t* table, long pages, const int64_t* starts,
                 const int64_t* tokens, long rows, long count, float* logits, int64_t* likeliest, int threads) {
    const long hidden = model.hidden, size = model.head_dim, half = size / 2, group = model.heads / model.kv_heads;
    const long q_size = model.heads * size, kv_size = model.kv_heads * size;
    std::vector<float> q(rows * q_size), k(rows * kv_size), v(rows * kv_size);
    const long each = rows / count;
    int pieces;
    const std::vector<Share> shares = shares_of(rows, each, model.kv_heads, group, threads, pages, &pieces);
    std::vector<float> mixed(pieces * rows * q_size), logs(pieces * rows * model.heads);
    Barrier barrier(threads);
    std::vector<float> x_room(rows * hidden), inner(rows * model.intermediate), cos(rows * half), sin(rows * half);
    float* x = x_room.data();
    std::vector<long> positions(rows);
    std::vector<Top> tops(threads * count);

    in_parallel(threads, [&](const long part) {
        const long parts = threads;
        std::vector<float> normed(rows * hidden), joined(pieces > 1 ? rows * q_size : 0);
        Room room(pages);
        Input input;
        const float* last = nullptr;
        const auto norm = [&](const float* weight) {
            for (long m = 0; m < rows; m++) rms_norm(&x[m * hidden], weight, hidden, model.eps, &normed[m * hidden]);
        };
        // This thread's share of a product, given to `put` as it comes: put(row, first output, how many, their values).
        // `given` is null where it is what the last product was given. `next` is whose weights this thread reads then: the
        // first of them are on their way while it computes what lies between.
        const auto share = [&](const Linear& w, const float* given, long rows, const Linear& next, auto put) {
            if (given) last = given;
            if (given || !input.fits(w)) input.take(w, last, rows);
            const long panels = w.panels();
            products(w, panels * part / parts, panels * (part + 1) / parts, input, next.codes_of(next.panels() * part / parts),
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

        for (long m = part; m < rows; m += parts) {
            std::memcpy(x + m * hidden, model.embedding + tokens[m] * hidden, hidden * sizeof(float));
            if (model.enter.base) turn(model.enter, hidden, x + m * hidden);
            positions[m] = starts[m / each] + m % each;
            for (long i = 0; i < half; i++) {
                const float angle = positions[m] * model.inverse_frequencies[i];
                cos[m * half + i] = std::cos(angle), sin[m * half + i] = std::sin(angle);
            }
        }
        barrier.wait();
        for (long l = 0; l < model.layers; l++) {
            const Layer& layer = model.layer[l];
            const auto seen_by = [&](long m, long h) {  // what row m sees with its head h
                const auto pages_of = [&](const Kept& kept) { return Pages(kept, l, model.kv_heads, h, size); };
                return Seen{cache, pages_of(cache.keys), pages_of(cache.values), table + m / each * pages};
            };
            const auto queries_of = [&](const Share& some, Query* queries) {
                for (int j = 0; j < some.count; j++) {
                    const long m = some.row + (some.first + j) / group, i = some.head * group + (some.first + j) % group;
                    const long first = layer.window ? std::max<long>(0, positions[m] - layer.window + 1) : 0;
                    const long at = (some.piece * rows + m) * model.heads + i;
                    queries[j] = {&q[m * q_size + i * size], first, positions[m], &mixed[at * size], &logs[at]};
                }
                cut(queries, some.count, some.piece, pieces);
            };
            norm(layer.input_norm);
            share(layer.q, normed.data(), rows, layer.k, into(q.data(), q_size));
            share(layer.k, nullptr, rows, layer.v, into(k.data(), kv_size));
            share(layer.v, nullptr, rows, layer.o, into(v.data(), kv_size));
            // What this thread's attention reads first comes while the threads wait for each other.
            long asked = 0;
            for (size_t unit = part; unit < shares.size() && asked < ASKED; unit += parts) {
                const Share& some = shares[unit];
                if (some.first > 0) continue;  // it sees the same
                Query queries[QUERIES];
                queries_of(some, queries);
                const Seen seen = seen_by(some.row, some.head);
                const long first = queries[0].first / LANES, end = std::min(queries[0].last / LANES + 1, first + PAGES_ASKED);
                for (const Pages* pages : {&seen.keys, &seen.values})
                    for (long p = first; p < end; p++) asked += pages->ask_for(seen.table[p]);
            }
            barrier.wait();
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
                for (float* query = &q[m * q_size + h * group * size]; query < &q[m * q_size] + (h + 1) * group * size; query += size) {
                    if (layer.q_norm) rms_norm(query, layer.q_norm, size, model.eps, query);
                    rotate(query, &cos[m * half], &sin[m * half], half);
                }
            }
            barrier.wait();
            for (size_t unit = part; unit < shares.size(); unit += parts) {
                const Share& some = shares[unit];
                Query queries[QUERIES];
                queries_of(some, queries);
                attend(some.count, queries, seen_by(some.row, some.head), room);
            }
            barrier.wait();
            if (pieces > 1) join(mixed.data(), logs.data(), pieces, rows * model.heads, size, joined.data());
            share(layer.o, pieces > 1 ? joined.data() : mixed.data(), rows, layer.gate, onto_x);
            barrier.wait();
            norm(layer.post_norm);
            share(layer.gate, normed.data(), rows, layer.up, into(inner.data(), model.intermediate));
            share(layer.up, nullptr, rows, layer.down, [&](long m, long n, long count, const float* values) {
                float* gate = &inner[m * model.intermediate + n];  // its panel is this thread's too
#pragma omp simd
                for (long j = 0; j < count; j++) gate[j] = gate[j] / (1 + exp_of(-gate[j])) * values[j];
            });
            barrier.wait();
            if (layer.mix.base) {
                for (long m = part; m < rows; m += parts) turn(layer.mix, model.intermediate, &inner[m * model.intermediate]);
                barrier.wait();
            }
            share(layer.down, inner.data(), rows, l + 1 < model.layers ? model.layer[l + 1].q : model.head, onto_x);
            barrier.wait();
        }
        for (long m = 0; m < count; m++) {
            float* row = &normed[m * hidden];
            std::memcpy(row, x + ((m + 1) * each - 1) * hidden, hidden * sizeof(float));
            if (model.leave.base) turn(model.leave, hidden, row);
            rms_norm(row, model.norm, hidden, model.eps, row);
        }
        const long vocab = model.head.out, panels = model.head.panels();
        share(model.head, normed.data(), count, model.layer[0].q, into(logits, vocab));
        const long first = panels * part / parts * LANES, end = std::min(vocab, panels * (part + 1) / parts * LANES);
        for (long m = 0; m < count; m++) tops[part * count + m] = top_of(logits + m * vocab, first, end);
    });
    for (long m = 0; m < count; m++) {
        Top top = tops[m];
        for (size_t i = m + count; i < tops.size(); i += count)
            if (tops[i].value > top.value) top = tops[i];
        likeliest[m] = top.at;
    }
}

}  // namespace
