// A vector of 16 numbers, and one of 16 times four bytes, in what the processor has: AVX-512 (with VNNI for the bytes, where it
// has that too), or AVX2 with FMA and F16C.

#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 16;

#if defined(__AVX512F__)

#if defined(__AVX512VNNI__)
constexpr const char* ARITHMETIC = "AVX-512 with VNNI";
#else
constexpr const char* ARITHMETIC = "AVX-512";
#endif
constexpr int TILE = 8;    // rows of x at once: as many sums as registers can hold
constexpr int CHAINS = 8;  // sums that must run beside each other, since each addition waits four cycles for the last
using Floats = __m512;
using Words = __m512i;
using Table = __m512;

inline Floats zeros() { return _mm512_setzero_ps(); }
inline Floats all(float x) { return _mm512_set1_ps(x); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline float largest_of(Floats x) { return _mm512_reduce_max_ps(x); }
inline float sum_of(Floats x) { return _mm512_reduce_add_ps(x); }
inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline Floats load(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
inline Words words(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline Table table_of(const float* p) { return load(p); }
// The lookup reads the four lowest bits of each word and no others.
template <int I>
inline Floats look_up(Table table, Words codes) {
    return _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4 * I), table);
}
// The I-th byte of each word, with its sign.
template <int I>
inline Floats byte(Words bytes) {
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(bytes, 24 - 8 * I), 24));
}
inline Words low_halves(Words bytes) { return _mm512_and_si512(bytes, _mm512_set1_epi8(15)); }
inline Words high_halves(Words bytes) { return low_halves(_mm512_srli_epi16(bytes, 4)); }

using Ints = __m512i;
inline Ints all_of(int32_t x) { return _mm512_set1_epi32(x); }
inline Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Floats floats(Ints x) { return _mm512_cvtepi32_ps(x); }
#if defined(__AVX512VNNI__)
inline Ints dot(Ints sum, Words codes, int32_t x) { return _mm512_dpbusd_epi32(sum, codes, all_of(x)); }
constexpr int BELOW = 128;  // the bytes get rid of their sign by adding so much
inline Ints dot_signed(Ints sum, Words bytes, int32_t x) {
    return dot(sum, _mm512_xor_si512(bytes, _mm512_set1_epi8(-128)), x);
}
#else
inline Ints dot(Ints sum, Words codes, int32_t x) {
    const Ints pairs = _mm512_maddubs_epi16(codes, all_of(x));  // up to 2 * 128 * 127: no pair overflows
    return add(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}
constexpr int BELOW = 0;
inline Ints dot_signed(Ints sum, Words bytes, int32_t x) {
    const Ints four = all_of(x), signs = _mm512_mask_sub_epi8(four, _mm512_movepi8_mask(bytes), _mm512_setzero_si512(), four);
    const Ints pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(bytes), signs);
    return add(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}
#endif

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
inline Floats multiply(Floats x, Floats y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline Floats larger(Floats x, Floats y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline float largest_of(Floats x) {
    const __m256 eight = _mm256_max_ps(x.a, x.b);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
inline float sum_of(Floats x) {
    const __m256 eight = _mm256_add_ps(x.a, x.b);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
inline Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline Floats load(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
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
template <int I>
inline __m256 byte_of_half(__m256i bytes) {
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(bytes, 24 - 8 * I), 24));
}
// The I-th byte of each word, with its sign.
template <int I>
inline Floats byte(Words bytes) {
    return {byte_of_half<I>(bytes.a), byte_of_half<I>(bytes.b)};
}
inline __m256i low_half(__m256i bytes) { return _mm256_and_si256(bytes, _mm256_set1_epi8(15)); }
inline Words low_halves(Words bytes) { return {low_half(bytes.a), low_half(bytes.b)}; }
inline Words high_halves(Words bytes) { return low_halves({_mm256_srli_epi16(bytes.a, 4), _mm256_srli_epi16(bytes.b, 4)}); }

using Ints = Words;
inline Ints all_of(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline Ints add(Ints x, Ints y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline Floats floats(Ints x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline __m256i dot_half(__m256i sum, __m256i codes, __m256i x) {
    const __m256i pairs = _mm256_maddubs_epi16(codes, x);  // up to 2 * 128 * 127: no pair overflows
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
inline Ints dot(Ints sum, Words codes, int32_t x) {
    const __m256i four = _mm256_set1_epi32(x);
    return {dot_half(sum.a, codes.a, four), dot_half(sum.b, codes.b, four)};
}
constexpr int BELOW = 0;
inline Ints dot_signed(Ints sum, Words bytes, int32_t x) {
    const __m256i four = _mm256_set1_epi32(x);
    return {dot_half(sum.a, _mm256_abs_epi8(bytes.a), _mm256_sign_epi8(four, bytes.a)),
            dot_half(sum.b, _mm256_abs_epi8(bytes.b), _mm256_sign_epi8(four, bytes.b))};
}

#else
#error "the kernel wants a processor with AVX2 or AVX-512"
#endif

// Eight numbers and whole numbers, in what either processor has.
using Chunk = __m256;
using ChunkInts = __m256i;
inline Chunk load_eight(const float* p) { return _mm256_loadu_ps(p); }
inline ChunkInts no_ints() { return _mm256_setzero_si256(); }
inline ChunkInts add(ChunkInts x, ChunkInts y) { return _mm256_add_epi32(x, y); }
inline ChunkInts nearest(Chunk x, float divisor) { return _mm256_cvtps_epi32(_mm256_div_ps(x, _mm256_set1_ps(divisor))); }
inline ChunkInts larger_of_sizes(ChunkInts largest, Chunk x) {  // compared as integers
    return _mm256_max_epi32(largest, _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff)));
}
inline float largest_of(ChunkInts sizes) {
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(sizes), _mm256_extracti128_si256(sizes, 1));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1))));
}
inline int32_t sum_of(ChunkInts x) {
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}
// As bytes, the first four here and the last four there.
inline void store_fours(ChunkInts x, int8_t* here, int8_t* there) {
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    const __m128i bytes = _mm_packs_epi16(words, words);
    const int32_t first = _mm_cvtsi128_si32(bytes), last = _mm_extract_epi32(bytes, 1);
    std::memcpy(here, &first, 4), std::memcpy(there, &last, 4);
}
inline int32_t four(const int8_t* p) {
    int32_t bytes;
    std::memcpy(&bytes, p, 4);
    return bytes;
}

inline float number(float x) { return x; }
inline float number(uint16_t float16) { return _cvtsh_ss(float16); }

// What a thread reads in one go: the end of it, and where it goes on after that.
struct Stretch {
    const uint8_t *end, *next;
};

// Asks for what is read soon, where `bytes` of it are read now. The processor guesses too, but no further than to the end of a
// page, and too late: with this, weights come out of memory half again as fast.
inline void fetch_ahead(const uint8_t* now, long bytes, const Stretch& here) {
    constexpr long AHEAD = 12 << 10, LINE = 64;
    const uint8_t* soon = now + AHEAD < here.end ? now + AHEAD : here.next + (now + AHEAD - here.end);
    for (long i = 0; i < bytes; i += LINE) _mm_prefetch((const char*)soon + i, _MM_HINT_T0);
}

inline void fetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
inline void fetch_for_later(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }  // not into the nearest cache

inline float largest_of(const float* x, long size) {
    float largest = -INFINITY;
    long i = 0;
    if (size >= LANES) {
        Floats many = load(x);
        for (i = LANES; i + LANES <= size; i += LANES) many = larger(many, load(x + i));
        largest = largest_of(many);
    }
    for (; i < size; i++) largest = x[i] > largest ? x[i] : largest;
    return largest;
}

// dot: sum + the four bytes of each lane, 0 to 15, times the four of x, -127 to 127. dot_signed: bytes from -128 to 127,
// to each of which BELOW was added, so that BELOW times the sum of x's bytes is still to be taken off.

// e^x to a few units in the last place (the polynomial of Moshier's Cephes), in a form that compilers make vectors of.
__attribute__((always_inline)) inline float exp_of(float x) {  // a call would keep loops from being vectors
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    const float n = std::nearbyint(x * 1.44269504f), r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    const int32_t bits = (int32_t(n) + 127) << 23;
    float power;
    __builtin_memcpy(&power, &bits, 4);
    return (p * r * r + r + 1) * power;
}

}  // namespace
