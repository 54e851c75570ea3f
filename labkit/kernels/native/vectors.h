// A vector of 16 numbers in what the processor has: AVX-512, or AVX2 with FMA and F16C.

#pragma once
#include <cmath>
#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 16;

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

inline float sum_of(Floats x) {
    float v[LANES], sum = 0;
    store(v, x);
    for (float one : v) sum += one;
    return sum;
}

// e^x to a few units in the last place (the polynomial of Moshier's Cephes), in a form that compilers make vectors of.
inline float exp_of(float x) {
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
