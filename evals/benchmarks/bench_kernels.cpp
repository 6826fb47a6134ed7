// What decode kernels are measured against: bf16 attention of one token that reads each KV head once for all its query
// heads, the machine's read bandwidth and its int8 dot products. Compiled on first use with -march=native: AVX-512
// and AVX-512-BF16 by hand, everything else by the compiler's vectorizer.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__AVX512F__)
#define AVX512 1
#endif
#define UNROLL _Pragma("GCC unroll 4")  // sums in arrays become registers only when their loops are gone

namespace {

constexpr int TILE = 128;        // tokens whose rows stay in the nearest caches while all query heads read them
constexpr int SPLIT = 2048;      // tokens of one unit of work
constexpr int QUERIES = 4;       // query heads whose sums stay in registers
constexpr int AHEAD = 4096;      // bytes that are fetched ahead
constexpr float NEG = -std::numeric_limits<float>::infinity();

struct Job {
  const uint16_t *k, *v;  // [heads][tokens][dim] bf16
  const float* q;         // [heads][group][dim]
  float* out;             // [heads][group][dim]
  int32_t heads, group, dim, threads, portable;
  int64_t tokens;
  float scale;
};

inline float widen(uint16_t x) {
  uint32_t bits = uint32_t(x) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// exp for x <= 0 as 2^n 2^f, the Taylor series of 2^f on |f| <= 1/2; written so that compilers vectorize loops over it.
inline float exp_negative(float x) {
  x = std::max(x, -80.0f) * 1.44269504f;
  float n = std::nearbyint(x), f = x - n, p = 1.5403530e-4f;
  p = p * f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  int32_t bits = (int32_t(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return p * power;
}

// Scores of n <= TILE tokens for nq queries: s[q][t] = q·k_t, not yet scaled.
void scores_portable(const uint16_t* k, const float* q, int dim, int n, int nq, float (*s)[TILE]) {
  float row[256];
  for (int t = 0; t < n; t++) {
#pragma omp simd
    for (int d = 0; d < dim; d++) row[d] = widen(k[int64_t(t) * dim + d]);
    for (int j = 0; j < nq; j++) {
      const float* query = q + int64_t(j) * dim;
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int d = 0; d < dim; d++) sum += query[d] * row[d];
      s[j][t] = sum;
    }
  }
}

// acc[q][d] += Σ_t w[q][t] v[t][d]
void readout_portable(const uint16_t* v, int dim, int n, int nq, const float (*w)[TILE], float* acc) {
  float row[256];
  for (int t = 0; t < n; t++) {
#pragma omp simd
    for (int d = 0; d < dim; d++) row[d] = widen(v[int64_t(t) * dim + d]);
    for (int j = 0; j < nq; j++) {
      float weight = w[j][t], *sum = acc + int64_t(j) * dim;
#pragma omp simd
      for (int d = 0; d < dim; d++) sum[d] += weight * row[d];
    }
  }
}

#if AVX512
// Sums within quarters of four vectors: quarter i of the result holds four partial sums, one of each vector.
inline __m512 quarter_sums(__m512 a, __m512 b, __m512 c, __m512 d) {
  __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  __m512d x = _mm512_castps_pd(ab), y = _mm512_castps_pd(cd);
  return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
}

// The sums of 16 vectors in order, from four quarter_sums.
inline __m512 whole_sums(const __m512* u) {
  __m512 a = _mm512_add_ps(_mm512_shuffle_f32x4(u[0], u[1], 0x44), _mm512_shuffle_f32x4(u[0], u[1], 0xEE));
  __m512 b = _mm512_add_ps(_mm512_shuffle_f32x4(u[2], u[3], 0x44), _mm512_shuffle_f32x4(u[2], u[3], 0xEE));
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
}

// The even and the odd ones of 32 bf16, as fp32.
inline __m512 evens(__m512i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }
inline __m512 odds(__m512i x) { return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(int(0xffff0000)))); }

// A query in the order that dots reads it. Dot: bf16, which its numbers must be already; else fp32, evens then odds.
template <bool Dot>
void arrange(const float* q, int dim, float* to) {
  for (int d = 0; d < dim; d += 32)
    for (int i = 0; i < 16; i++) {
      if (Dot) {
        uint32_t low, high;
        std::memcpy(&low, q + d + 2 * i, 4);
        std::memcpy(&high, q + d + 2 * i + 1, 4);
        low = low >> 16 | (high & 0xffff0000u);
        std::memcpy(to + d / 2 + i, &low, 4);
      } else {
        to[d + i] = q[d + 2 * i];
        to[d + 16 + i] = q[d + 2 * i + 1];
      }
    }
}

// Scores of n <= TILE tokens; the values that follow are fetched meanwhile. q: of arrange, dim floats (Dot: half) each.
template <int NQ, bool Dot>
void scores_by_hand(const uint16_t* k, const float* q, int dim, int n, const uint16_t* next, float (*s)[TILE]) {
  int width = Dot ? dim / 2 : dim;
  for (int t0 = 0; t0 < n; t0 += 16) {
    __m512 quarters[NQ][4];
    UNROLL for (int four = 0; four < 4; four++) {
      const uint16_t* row[4];
      __m512 sum[NQ][4];
      UNROLL for (int i = 0; i < 4; i++) {
        int t = std::min(t0 + four * 4 + i, n - 1);
        row[i] = k + int64_t(t) * dim;
        if (next)
          for (int d = 0; d < dim; d += 32) _mm_prefetch((const char*)(next + int64_t(t) * dim + d), _MM_HINT_T1);
        UNROLL for (int j = 0; j < NQ; j++) sum[j][i] = _mm512_setzero_ps();
      }
      for (int d = 0; d < dim; d += 32)
        UNROLL for (int i = 0; i < 4; i++) {
          __m512i keys = _mm512_loadu_si512(row[i] + d);
          UNROLL for (int j = 0; j < NQ; j++) {
#if defined(__AVX512BF16__)
            if (Dot) {
              __m512i query = _mm512_loadu_si512(q + j * width + d / 2);
              sum[j][i] = _mm512_dpbf16_ps(sum[j][i], (__m512bh)keys, (__m512bh)query);
              continue;
            }
#endif
            sum[j][i] = _mm512_fmadd_ps(evens(keys), _mm512_loadu_ps(q + j * width + d), sum[j][i]);
            sum[j][i] = _mm512_fmadd_ps(odds(keys), _mm512_loadu_ps(q + j * width + d + 16), sum[j][i]);
          }
        }
      UNROLL for (int j = 0; j < NQ; j++) quarters[j][four] = quarter_sums(sum[j][0], sum[j][1], sum[j][2], sum[j][3]);
    }
    UNROLL for (int j = 0; j < NQ; j++) _mm512_storeu_ps(s[j] + t0, whole_sums(quarters[j]));
  }
}

// acc[q][d] += Σ_t w[q][t] v[t][d], in passes of 32·C channels, whose sums stay in registers; `next` is fetched meanwhile.
template <int NQ, int C>
void readout_by_hand(const uint16_t* v, int dim, int n, const float (*w)[TILE], const uint16_t* next, float* acc) {
  for (int first = 0; first < dim; first += 32 * C) {
    __m512 sum[NQ][C][2];
    UNROLL for (int j = 0; j < NQ; j++)
      UNROLL for (int c = 0; c < C; c++) sum[j][c][0] = sum[j][c][1] = _mm512_setzero_ps();
    for (int t = 0; t < n; t++) {
      int64_t at = int64_t(t) * dim + first;
      if (next)
        UNROLL for (int c = 0; c < C; c++) _mm_prefetch((const char*)(next + at + c * 32), _MM_HINT_T1);
      UNROLL for (int c = 0; c < C; c++) {
        __m512i x = _mm512_loadu_si512(v + at + c * 32);
        __m512 even = evens(x), odd = odds(x);
        UNROLL for (int j = 0; j < NQ; j++) {
          __m512 weight = _mm512_set1_ps(w[j][t]);
          sum[j][c][0] = _mm512_fmadd_ps(weight, even, sum[j][c][0]);
          sum[j][c][1] = _mm512_fmadd_ps(weight, odd, sum[j][c][1]);
        }
      }
    }
    const __m512i left = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i right = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    UNROLL for (int j = 0; j < NQ; j++)
      UNROLL for (int c = 0; c < C; c++) {
        float* to = acc + j * dim + first + c * 32;
        __m512 x = _mm512_permutex2var_ps(sum[j][c][0], left, sum[j][c][1]);
        __m512 y = _mm512_permutex2var_ps(sum[j][c][0], right, sum[j][c][1]);
        _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), x));
        _mm512_storeu_ps(to + 16, _mm512_add_ps(_mm512_loadu_ps(to + 16), y));
      }
  }
}

template <int NQ>
void scores_path(const uint16_t* k, const float* q, bool dot, int dim, int n, const uint16_t* next, float (*s)[TILE]) {
  if (dot) return scores_by_hand<NQ, true>(k, q, dim, n, next, s);
  scores_by_hand<NQ, false>(k, q, dim, n, next, s);
}

template <int NQ>
void readout_path(const uint16_t* v, int dim, int n, const float (*w)[TILE], const uint16_t* next, float* acc) {
  if (dim % 64 == 0) return readout_by_hand<NQ, 2>(v, dim, n, w, next, acc);
  readout_by_hand<NQ, 1>(v, dim, n, w, next, acc);
}
#endif

// Whether bf16 dot products are at hand and lose nothing of these queries.
inline bool bf16_dot(const float* q, int n) {
#if defined(__AVX512BF16__)
  for (int i = 0; i < n; i++) {
    uint32_t bits;
    std::memcpy(&bits, q + i, 4);
    if (bits & 0xffff) return false;
  }
  return true;
#else
  (void)q, (void)n;
  return false;
#endif
}

// One unit of work: tokens first … last of a head, all its queries. part: maxima, sums, accumulators.
void unit(const Job& a, int head, int64_t first, int64_t last, float* part) {
  int group = a.group, dim = a.dim;
  float *most = part, *total = part + group, *acc = part + 2 * group;
  std::fill(most, most + group, NEG);
  std::fill(total, total + group, 0.0f);
  std::fill(acc, acc + int64_t(group) * dim, 0.0f);
  const float* q = a.q + int64_t(head) * group * dim;
#if AVX512
  bool by_hand = !a.portable && dim % 32 == 0, dot = by_hand && bf16_dot(q, group * dim);
  std::vector<float> arranged(by_hand ? int64_t(group) * dim : 0);
  int width = dot ? dim / 2 : dim;
  for (int j = 0; by_hand && j < group; j++) {
    if (dot)
      arrange<true>(q + j * dim, dim, &arranged[j * width]);
    else
      arrange<false>(q + j * dim, dim, &arranged[j * width]);
  }
#endif
  for (int64_t t0 = first; t0 < last; t0 += TILE) {
    int n = int(std::min<int64_t>(TILE, last - t0));
    const uint16_t *k = a.k + (int64_t(head) * a.tokens + t0) * dim, *v = a.v + (int64_t(head) * a.tokens + t0) * dim;
    for (int q0 = 0; q0 < group; q0 += QUERIES) {
      int nq = std::min(QUERIES, group - q0);
      alignas(64) float s[QUERIES][TILE];
#if AVX512
      const uint16_t *follow = q0 ? nullptr : v, *next = q0 || t0 + TILE >= last ? nullptr : k + int64_t(TILE) * dim;
      if (by_hand) {
        const float* query = &arranged[q0 * width];
        switch (nq) {
          case 1: scores_path<1>(k, query, dot, dim, n, follow, s); break;
          case 2: scores_path<2>(k, query, dot, dim, n, follow, s); break;
          case 3: scores_path<3>(k, query, dot, dim, n, follow, s); break;
          default: scores_path<4>(k, query, dot, dim, n, follow, s);
        }
      } else
#endif
        scores_portable(k, q + int64_t(q0) * dim, dim, n, nq, s);
      for (int j = 0; j < nq; j++) {
        float peak = most[q0 + j], sum = 0, *to = acc + int64_t(q0 + j) * dim;
#pragma omp simd reduction(max : peak)
        for (int t = 0; t < n; t++) {
          s[j][t] *= a.scale;
          peak = std::max(peak, s[j][t]);
        }
#pragma omp simd reduction(+ : sum)
        for (int t = 0; t < n; t++) {
          s[j][t] = exp_negative(s[j][t] - peak);
          sum += s[j][t];
        }
        for (int t = n; t < TILE; t++) s[j][t] = 0;
        float keep = most[q0 + j] == NEG ? 0.0f : std::exp(most[q0 + j] - peak);
        if (keep != 1)
          for (int d = 0; d < dim; d++) to[d] *= keep;
        total[q0 + j] = total[q0 + j] * keep + sum;
        most[q0 + j] = peak;
      }
      float* to = acc + int64_t(q0) * dim;
#if AVX512
      if (by_hand) {
        switch (nq) {
          case 1: readout_path<1>(v, dim, n, s, next, to); break;
          case 2: readout_path<2>(v, dim, n, s, next, to); break;
          case 3: readout_path<3>(v, dim, n, s, next, to); break;
          default: readout_path<4>(v, dim, n, s, next, to);
        }
      } else
#endif
        readout_portable(v, dim, n, nq, s, to);
    }
  }
}

// 64 bytes, whatever the machine makes of them.
typedef uint64_t Line __attribute__((vector_size(64), aligned(64), may_alias));

}  // namespace

extern "C" void bench_bf16_decode(const Job* job) {
  const Job& a = *job;
  // at least a few units per thread, so that no thread waits long for another
  int64_t size = std::min<int64_t>(SPLIT, std::max<int64_t>(TILE, a.tokens * a.heads / (4 * a.threads) / TILE * TILE));
  int64_t splits = std::max<int64_t>((a.tokens + size - 1) / size, 1), width = int64_t(a.group) * (a.dim + 2);
  std::vector<float> parts(width * a.heads * splits);
#pragma omp parallel num_threads(a.threads)
  {
#pragma omp for schedule(dynamic) collapse(2)
    for (int h = 0; h < a.heads; h++)
      for (int64_t c = 0; c < splits; c++)
        unit(a, h, c * size, std::min(a.tokens, (c + 1) * size), &parts[width * (h * splits + c)]);
#pragma omp for schedule(static)
    for (int h = 0; h < a.heads; h++)
      for (int j = 0; j < a.group; j++) {
        const float* first = &parts[width * h * splits];
        float peak = NEG, sum = 0, *out = a.out + (int64_t(h) * a.group + j) * a.dim;
        std::fill(out, out + a.dim, 0.0f);
        for (int64_t c = 0; c < splits; c++) peak = std::max(peak, first[c * width + j]);
        for (int64_t c = 0; c < splits; c++) {
          const float *part = first + c * width, *acc = part + 2 * a.group + int64_t(j) * a.dim;
          float factor = part[j] == NEG ? 0.0f : std::exp(part[j] - peak);
          sum += factor * part[a.group + j];
          for (int d = 0; d < a.dim; d++) out[d] += factor * acc[d];
        }
        for (int d = 0; d < a.dim; d++) out[d] /= sum;
      }
  }
}

extern "C" const char* bench_code_path() {
#if AVX512 && defined(__AVX512BF16__)
  return "AVX-512-BF16";
#elif defined(__AVX512F__)
  return "AVX-512";
#elif defined(__AVX2__)
  return "AVX2";
#else
  return "portable";
#endif
}

// Reads `lines` lines of 64 bytes, each thread its share as `streams` sequential streams; the sum, so that it must.
extern "C" uint64_t bench_read(const void* data, int64_t lines, int32_t streams, int32_t threads) {
  uint64_t result = 0;
  int64_t length = lines / threads / streams;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : result)
  for (int thread = 0; thread < threads; thread++) {
    const Line* from = (const Line*)data + int64_t(thread) * streams * length;
    Line sums[8] = {};
    for (int64_t i = 0; i + 4 <= length; i += 4)
      for (int s = 0; s < streams; s++) {
        const Line* line = from + s * length + i;
        for (int j = 0; j < 4; j++) {
          __builtin_prefetch((const char*)(line + j) + AHEAD);
          sums[j + (s & 1) * 4] += line[j];
        }
      }
    for (const Line& sum : sums)
      for (int i = 0; i < 8; i++) result += sum[i];
  }
  return result;
}

// u8 x s8 dot products on registers alone; how many multiply-adds one call of `rounds` rounds made in all threads.
extern "C" int64_t bench_int8(int64_t rounds, int32_t threads, int32_t* sink) {
  constexpr int CHAINS = 12;
  int64_t done = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : done)
  for (int thread = 0; thread < threads; thread++) {
#if defined(__AVX512VNNI__)
    __m512i sum[CHAINS], x = _mm512_set1_epi8(char(sink[0] & 3)), y = _mm512_set1_epi8(char(sink[1] & 3));
    for (int c = 0; c < CHAINS; c++) sum[c] = _mm512_set1_epi32(c + sink[2]);  // equal chains would become one
    for (int64_t i = 0; i < rounds; i++)
      for (auto& s : sum) s = _mm512_dpbusd_epi32(s, x, y);
    int32_t all = 0;
    for (auto& s : sum) all += _mm512_reduce_add_epi32(s);
    done += rounds * CHAINS * 64;
#elif defined(__AVX2__)
    __m256i sum[CHAINS], x = _mm256_set1_epi8(char(sink[0] & 3)), y = _mm256_set1_epi8(char(sink[1] & 3));
    for (int c = 0; c < CHAINS; c++) sum[c] = _mm256_set1_epi32(c + sink[2]);  // equal chains would become one
    for (int64_t i = 0; i < rounds; i++)
      for (auto& s : sum) {
        __m256i u = _mm256_xor_si256(x, s);  // of the sum, so that the product is not lifted out of the loop
        s = _mm256_add_epi32(s, _mm256_madd_epi16(_mm256_maddubs_epi16(u, y), _mm256_set1_epi16(1)));
      }
    int32_t all = 0;
    for (auto& s : sum) all += _mm256_extract_epi32(s, 0) + _mm256_extract_epi32(s, 7);
    done += rounds * CHAINS * 32;
#else
    constexpr int BYTES = 256;
    uint8_t u[BYTES];
    int8_t w[BYTES];
    for (int i = 0; i < BYTES; i++) {
      u[i] = uint8_t(i + sink[0]);
      w[i] = int8_t(i + sink[1]);
    }
    int32_t all = 0;
    for (int64_t r = 0; r < rounds; r++) {
      int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int i = 0; i < BYTES; i++) sum += int32_t(u[i]) * w[i];
      u[r % BYTES] = uint8_t(sum);
      all += sum;
    }
    done += rounds * BYTES;
#endif
#pragma omp atomic
    sink[2] += all;
  }
  return done;
}
