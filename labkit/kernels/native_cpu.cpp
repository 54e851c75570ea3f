// y = x W^T for weights of 4 or 8 bits, without ever writing W out in full: compiled by build.py, called by native_cpu.py.
//
// Weights lie in panels of 16 output features, so that one vector register holds one input's weights for all 16. A chunk
// is 8 inputs of a panel: of 4 bits, a 32-bit word for each of the 16 rows, the first input in its lowest bits; of 8
// bits, 16 bytes for each input. A group's `width` inputs share a scale and an offset for each row:
//
//     y[m, n] = sum over groups g of  scale[g, n] * (sum over k in g of x[m, k] * value[n, k]  +  offset[g, n] * sum over k in g of x[m, k])
//
// where value is table[code] (4 bits) or the code itself, signed (8 bits). All sums are float32.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 16;  // output features of a panel
constexpr int CHUNK = 8;   // inputs that are loaded together

// A vector of 16 floats, and of 16 words, in what the processor has: AVX-512, or AVX2 with FMA and F16C.

#if defined(__AVX512F__)

constexpr const char* ARITHMETIC = "AVX-512";
constexpr int TILE = 8;    // rows of x at once: as many sums as registers can hold
constexpr int CHAINS = 8;  // sums that must run beside each other, since each addition waits four cycles for the last
using Floats = __m512;
using Words = __m512i;
using Table = __m512;

inline Floats zeros() { return _mm512_setzero_ps(); }
inline Floats all(float x) { return _mm512_set1_ps(x); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline Floats load(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline Floats load(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
inline Words words(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline Table table_of(const float* p) { return load(p); }
// The lookup reads the four lowest bits of each word and no others.
template <int I>
inline Floats look_up(Table table, Words codes) {
    return _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4 * I), table);
}

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

constexpr const char* ARITHMETIC = "AVX2";
constexpr int TILE = 4;
constexpr int CHAINS = 4;  // of two registers each
struct Floats { __m256 a, b; };
struct Words { __m256i a, b; };
using Table = Floats;

inline Floats zeros() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Floats all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Floats multiply_add(Floats x, Floats y, Floats z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
inline Floats add(Floats x, Floats y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline Floats load(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
inline Floats load(const int8_t* p) {
    __m128i bytes = _mm_loadu_si128((const __m128i*)p);
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}
inline void store(float* p, Floats x) { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
inline Words words(const uint8_t* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))};
}
inline Table table_of(const float* p) { return load(p); }
// Each half of the table is looked up by three bits; the fourth, moved to the sign, chooses between them.
inline __m256 look_up_half(Table table, __m256i codes) {
    __m256 low = _mm256_permutevar8x32_ps(table.a, codes), high = _mm256_permutevar8x32_ps(table.b, codes);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28)));
}
template <int I>
inline Floats look_up(Table table, Words codes) {
    return {look_up_half(table, _mm256_srli_epi32(codes.a, 4 * I)), look_up_half(table, _mm256_srli_epi32(codes.b, 4 * I))};
}

#else
#error "the kernel wants a processor with AVX2 or AVX-512"
#endif

// What the two widths of codes have in common: the bytes of a chunk, and a chunk's product with rows of x.

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

struct Shape {
    long rows, out, in, width;  // in: padded to whole chunks; width: inputs of a group, whole chunks too
    long groups() const { return (in + width - 1) / width; }
};

// How many sums each of so many rows has, so that there are enough of them in all.
constexpr int sums_of(int rows) {
    int sums = 1;
    while (rows * sums < CHAINS) sums *= 2;
    return sums;
}

// The products of ROWS rows of x, (ROWS, in), with one panel. sums, (ROWS, groups), are those of x over each group; y is
// (ROWS, out), of which `stored` numbers are this panel's.
template <int ROWS, class Codes, class Stored>
void panel(const Codes& codes, const uint8_t* p, const Stored* scale, const Stored* offset, const float* x, const float* sums,
           const Shape& s, float* y, long stored) {
    constexpr int SUMS = sums_of(ROWS);
    Floats total[ROWS];
    for (auto& t : total) t = zeros();
    const long groups = s.groups();
    for (long g = 0; g < groups; g++, scale += LANES) {
        Floats sum[ROWS][SUMS];
        for (auto& row : sum)
            for (auto& one : row) one = zeros();
        const long end = std::min(s.in, (g + 1) * s.width);
        for (long k = g * s.width; k < end; k += CHUNK, p += Codes::BYTES) {
            codes.chunk(p, [&](int i, const Floats& value) {
                for (int m = 0; m < ROWS; m++)
                    sum[m][i % SUMS] = multiply_add(value, all(x[m * s.in + k + i]), sum[m][i % SUMS]);
            });
        }
        const Floats step = load(scale);
        for (int m = 0; m < ROWS; m++) {
            for (int i = 1; i < SUMS; i++) sum[m][0] = add(sum[m][0], sum[m][i]);
            if (offset) sum[m][0] = multiply_add(load(offset + g * LANES), all(sums[m * groups + g]), sum[m][0]);
            total[m] = multiply_add(sum[m][0], step, total[m]);
        }
    }
    for (int m = 0; m < ROWS; m++) {
        float whole[LANES];
        store(whole, total[m]);
        std::memcpy(y + m * s.out, whole, stored * sizeof(float));
    }
}

template <class Codes, class Stored, int ROWS = TILE>
void tile(long rows, const Codes& codes, const uint8_t* p, const Stored* scale, const Stored* offset, const float* x,
          const float* sums, const Shape& s, float* y, long stored) {
    if constexpr (ROWS > 0) {
        if (rows == ROWS) panel<ROWS>(codes, p, scale, offset, x, sums, s, y, stored);
        else tile<Codes, Stored, ROWS - 1>(rows, codes, p, scale, offset, x, sums, s, y, stored);
    }
}

template <class Codes, class Stored>
void linear(const Codes& codes, const uint8_t* p, const Stored* scale, const Stored* offset, const float* x, const float* sums,
            const Shape& s, float* y, int threads) {
    const long panels = (s.out + LANES - 1) / LANES, groups = s.groups();
    const long panel_bytes = s.in / CHUNK * Codes::BYTES;
    const long near = std::max(1L, (256L << 10) / panel_bytes);  // panels that stay in the core's own cache
    const long block = std::max(1L, std::min(near, (panels + threads - 1) / threads));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long first = 0; first < panels; first += block)
        for (long m = 0; m < s.rows; m += TILE)
            for (long n = first; n < std::min(panels, first + block); n++)
                tile(std::min<long>(TILE, s.rows - m), codes, p + n * panel_bytes, scale + n * groups * LANES,
                     offset ? offset + n * groups * LANES : nullptr, x + m * s.in, sums + m * groups, s,
                     y + m * s.out + n * LANES, std::min<long>(LANES, s.out - n * LANES));
}

template <class Stored>
void by_bits(int bits, const uint8_t* p, const float* table, const void* scale, const void* offset, const float* x,
             const float* sums, const Shape& s, float* y, int threads) {
    const auto *steps = (const Stored*)scale, *offsets = (const Stored*)offset;
    if (bits == 4) linear(Four(table), p, steps, offsets, x, sums, s, y, threads);
    else linear(Eight(table), p, steps, offsets, x, sums, s, y, threads);
}

}  // namespace

extern "C" {

const char* labkit_arithmetic() { return ARITHMETIC; }

// x (rows, in) and y (rows, out) float32; `in` padded to whole chunks, with zeros in x. scale and offset (panels, groups,
// 16), float16 where `half` and else float32; offset may be null.
void labkit_linear(int bits, const uint8_t* codes, const float* table, const void* scale, const void* offset, int half,
                   const float* x, float* y, long rows, long out, long in, long width, int threads) {
    const Shape s{rows, out, in, width};
    std::vector<float> sums(offset ? rows * s.groups() : 0);
    for (size_t i = 0; i < sums.size(); i++) {
        const long first = i % s.groups() * width, end = std::min(in, first + width);
        for (long k = first; k < end; k++) sums[i] += x[i / s.groups() * in + k];
    }
    if (half) by_bits<uint16_t>(bits, codes, table, scale, offset, x, sums.data(), s, y, threads);
    else by_bits<float>(bits, codes, table, scale, offset, x, sums.data(), s, y, threads);
}
}
