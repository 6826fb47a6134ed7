// decode_attention on the CPU: one segment of packed keys and values, read once per KV head for all its queries.
// Codes stay integers: a query is two int8 planes (15 bits), softmax weights are two 7-bit planes, and sums are
// u8 x s8 dot products. Layout of the planes: see layout.py. Compiled on first use with -march=native; the code
// path is chosen at run time (isa: 0 portable, 1 AVX2, 2 AVX-512-VNNI), among those this compiler could build.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int TILE = 16;       // tokens of a key granule, channels of a value granule
constexpr int CHUNK = 512;     // tokens of one unit of work
constexpr int WEIGHTS = 128;   // tokens whose softmax weights share one integer scale
constexpr int QUERIES = 4;     // queries whose accumulators stay in registers
constexpr float NEG = -std::numeric_limits<float>::infinity();

struct Plane { const uint8_t* data; int64_t batch_stride, head_stride, tile_stride; int32_t width, columns; };
struct Scale { const uint16_t* data; int64_t batch_stride, head_stride, token_stride; };

struct Args {
  int32_t batch, kv_heads, queries, slots, head_dim;  // queries: rows per KV head (group x new tokens)
  int32_t key_planes, value_planes, value_bits, groups, threads, isa, new_tokens;
  Plane k[3], v[2];
  Scale k_scale, k_zero, v_scale, v_zero;                     // k_zero.data, v_zero.data may be null
  const float *q[3], *bias, *zero_query, *gauge;              // q[p]: [batch, kv_heads, queries, columns of plane p]
  const int64_t *start, *stop;                                // [batch, new_tokens]
  const uint8_t* valid;                                       // [batch, valid_stride] or null
  int64_t valid_stride;
  float *out, *lse;                                           // [batch, kv_heads, queries, head_dim], [.., queries]
};

inline float half_to_float(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023, bits;
  if (exponent == 0) {
    float f = std::ldexp(float(mantissa), -24);
    return sign ? -f : f;
  }
  bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
#endif
}

void halves(const uint16_t* from, int64_t stride, int n, float* to) {
  int i = 0;
#if defined(__AVX512F__)
  if (stride == 1)
    for (; i + 16 <= n; i += 16) _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(from + i))));
#elif defined(__F16C__) && defined(__AVX2__)
  if (stride == 1)
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + i))));
#endif
  for (; i < n; i++) to[i] = half_to_float(from[i * stride]);
}

// exp for x <= 0, relative error below 3e-7; written so that compilers vectorize loops over it.
inline float exp_negative(float x) {
  x = std::max(x, -87.0f) * 1.44269504f;
  float n = std::nearbyint(x), f = x - n;
  float p = 1.5353362e-4f;
  p = p * f + 1.3398874e-3f;
  p = p * f + 9.6184370e-3f;
  p = p * f + 5.5503324e-2f;
  p = p * f + 2.4022648e-1f;
  p = p * f + 6.9314720e-1f;
  p = p * f + 1.0f;
  int32_t bits = (int32_t(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, 4);
  return p * scale;
}

// One 16-token tile of one key plane against nq queries: sum[q][t] += hi·128 + lo over the plane's columns.
template <int W>
void key_tile_portable(const uint8_t* tile, int granules, const int8_t* hi, const int8_t* lo, int stride, int nq, int32_t* sum) {
  constexpr int P = 8 / W, MASK = (1 << W) - 1;
  for (int q = 0; q < nq; q++)
    for (int g = 0; g < granules; g++)
      for (int t = 0; t < TILE; t++)
        for (int p = 0; p < P; p++)
          for (int i = 0; i < 4; i++) {
            int code = (tile[(g * TILE + t) * 4 + i] >> (p * W)) & MASK, at = q * stride + (g * P + p) * 4 + i;
            sum[q * TILE + t] += code * (hi[at] * 128 + lo[at]);
          }
}

// n tokens of one 16-channel column of one value plane: sum[q][c] += code · (hi·128 + lo).
template <int W>
void value_tile_portable(const uint8_t* column, int64_t tile_stride, int tiles, const int8_t* hi, const int8_t* lo, int stride, int nq, int32_t* sum) {
  constexpr int P = 8 / W, MASK = (1 << W) - 1;
  for (int q = 0; q < nq; q++)
    for (int t = 0; t < tiles; t++)
      for (int c = 0; c < TILE; c++)
        for (int p = 0; p < P; p++)
          for (int i = 0; i < 4; i++) {
            int code = (column[t * tile_stride + c * 4 + i] >> (p * W)) & MASK, at = q * stride + (t * P + p) * 4 + i;
            sum[q * TILE + c] += code * (hi[at] * 128 + lo[at]);
          }
}

#if defined(__AVX2__)
inline __m256i dot_avx2(__m256i sum, __m256i u8, __m256i s8) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(u8, s8), _mm256_set1_epi16(1)));
}
inline int32_t word(const int8_t* x) { int32_t w; std::memcpy(&w, x, 4); return w; }

// Keys and values share this loop: n granules of 64 bytes, `step` bytes apart, 16 lanes, P words of weights each.
template <int W, int NQ>
void tile_avx2(const uint8_t* data, int64_t step, int n, const int8_t* hi, const int8_t* lo, int stride, int32_t* sum) {
  constexpr int P = 8 / W;
  const __m256i mask = _mm256_set1_epi8((1 << W) - 1);
  for (int half = 0; half < 2; half++) {
    __m256i a[NQ], b[NQ];
    for (int q = 0; q < NQ; q++) a[q] = b[q] = _mm256_setzero_si256();
    for (int g = 0; g < n; g++) {
      __m256i bytes = _mm256_loadu_si256((const __m256i*)(data + g * step + half * 32));
      for (int p = 0; p < P; p++) {
        __m256i codes = _mm256_and_si256(_mm256_srli_epi16(bytes, p * W), mask);
        for (int q = 0; q < NQ; q++) {
          a[q] = dot_avx2(a[q], codes, _mm256_set1_epi32(word(hi + q * stride + (g * P + p) * 4)));
          b[q] = dot_avx2(b[q], codes, _mm256_set1_epi32(word(lo + q * stride + (g * P + p) * 4)));
        }
      }
    }
    for (int q = 0; q < NQ; q++) {
      __m256i* at = (__m256i*)(sum + q * TILE + half * 8);
      __m256i s = _mm256_add_epi32(_mm256_slli_epi32(a[q], 7), b[q]);
      _mm256_storeu_si256(at, _mm256_add_epi32(_mm256_loadu_si256(at), s));
    }
  }
}
#endif

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
template <int W, int NQ>
void tile_vnni(const uint8_t* data, int64_t step, int n, const int8_t* hi, const int8_t* lo, int stride, int32_t* sum) {
  constexpr int P = 8 / W;
  const __m512i mask = _mm512_set1_epi8((1 << W) - 1);
  __m512i a[NQ], b[NQ];
  for (int q = 0; q < NQ; q++) a[q] = b[q] = _mm512_setzero_si512();
  for (int g = 0; g < n; g++) {
    __m512i bytes = _mm512_loadu_si512(data + g * step);
    _mm_prefetch((const char*)data + g * step + 4096, _MM_HINT_T0);
    for (int p = 0; p < P; p++) {
      __m512i codes = _mm512_and_si512(_mm512_srli_epi16(bytes, p * W), mask);
      for (int q = 0; q < NQ; q++) {
        a[q] = _mm512_dpbusd_epi32(a[q], codes, _mm512_set1_epi32(word(hi + q * stride + (g * P + p) * 4)));
        b[q] = _mm512_dpbusd_epi32(b[q], codes, _mm512_set1_epi32(word(lo + q * stride + (g * P + p) * 4)));
      }
    }
  }
  for (int q = 0; q < NQ; q++) {
    __m512i s = _mm512_add_epi32(_mm512_slli_epi32(a[q], 7), b[q]);
    _mm512_storeu_si512(sum + q * TILE, _mm512_add_epi32(_mm512_loadu_si512(sum + q * TILE), s));
  }
}
#endif

// Dispatch on path, width and number of queries (1 to QUERIES).
template <int W, int NQ>
void tile_path(int isa, bool key, const uint8_t* data, int64_t step, int n, const int8_t* hi, const int8_t* lo, int stride, int32_t* sum) {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
  if (isa == 2) return tile_vnni<W, NQ>(data, step, n, hi, lo, stride, sum);
#endif
#if defined(__AVX2__)
  if (isa >= 1) return tile_avx2<W, NQ>(data, step, n, hi, lo, stride, sum);
#endif
  if (key) return key_tile_portable<W>(data, n, hi, lo, stride, NQ, sum);
  value_tile_portable<W>(data, step, n, hi, lo, stride, NQ, sum);
}

template <int W>
void tile_queries(int isa, bool key, const uint8_t* data, int64_t step, int n, const int8_t* hi, const int8_t* lo, int stride, int nq, int32_t* sum) {
  switch (nq) {
    case 1: return tile_path<W, 1>(isa, key, data, step, n, hi, lo, stride, sum);
    case 2: return tile_path<W, 2>(isa, key, data, step, n, hi, lo, stride, sum);
    case 3: return tile_path<W, 3>(isa, key, data, step, n, hi, lo, stride, sum);
    default: return tile_path<W, 4>(isa, key, data, step, n, hi, lo, stride, sum);
  }
}

void tile(int isa, bool key, int width, const uint8_t* data, int64_t step, int n, const int8_t* hi, const int8_t* lo, int stride, int nq, int32_t* sum) {
  if (width == 4) return tile_queries<4>(isa, key, data, step, n, hi, lo, stride, nq, sum);
  if (width == 2) return tile_queries<2>(isa, key, data, step, n, hi, lo, stride, nq, sum);
  tile_queries<1>(isa, key, data, step, n, hi, lo, stride, nq, sum);
}

// Two int8 planes of a query: x ≈ scale · (hi·128 + lo), |hi·128 + lo| <= 16128.
float split_query(const float* x, int n, int8_t* hi, int8_t* lo) {
  float most = 0;
  bool finite = true;
  for (int i = 0; i < n; i++) {
    most = std::max(most, std::fabs(x[i]));
    finite = finite && std::isfinite(x[i]);
  }
  if (!finite || most < 1e-30f) {  // a non-finite query gives NaN, as it does elsewhere
    std::memset(hi, 0, n);
    std::memset(lo, 0, n);
    return finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
  }
  float scale = most / 16128, inverse = 16128 / most;
  for (int i = 0; i < n; i++) {
    int w = int(std::nearbyint(x[i] * inverse)), h = (w + 64) >> 7;
    hi[i] = int8_t(h);
    lo[i] = int8_t(w - h * 128);
  }
  return scale;
}

// The queries of one KV head as integers, per plane, and what to multiply their sums with.
struct Query {
  std::vector<int8_t> hi[3], lo[3];
  std::vector<float> scale;  // [plane][query]
};

void prepare(const Args& a, int64_t head, Query& query) {
  query.scale.resize(3 * a.queries);
  for (int p = 0; p < a.key_planes; p++) {
    int n = a.k[p].columns;
    query.hi[p].resize(int64_t(n) * a.queries);
    query.lo[p].resize(int64_t(n) * a.queries);
    for (int q = 0; q < a.queries; q++) {
      int64_t at = int64_t(q) * n;
      query.scale[p * a.queries + q] = split_query(a.q[p] + (head * a.queries + q) * n, n, &query.hi[p][at], &query.lo[p][at]);
    }
  }
}

void scores(const Args& a, const Query& query, int b, int h, int q0, int nq, int t0, int t1, float* s /* [nq][CHUNK] */) {
  int64_t head = int64_t(b) * a.kv_heads + h;
  const uint16_t* scale = a.k_scale.data + b * a.k_scale.batch_stride + h * a.k_scale.head_stride;
  const uint16_t* zero = a.k_zero.data ? a.k_zero.data + b * a.k_zero.batch_stride + h * a.k_zero.head_stride : nullptr;
  alignas(64) float sigma[CHUNK], offset[CHUNK];
  halves(scale + t0 * a.k_scale.token_stride, a.k_scale.token_stride, t1 - t0, sigma);
  if (zero) halves(zero + t0 * a.k_zero.token_stride, a.k_zero.token_stride, t1 - t0, offset);
  for (int t = t0; t < t1; t += TILE) {
    alignas(64) float dot[QUERIES][TILE];
    for (int p = 0; p < a.key_planes; p++) {
      const Plane& k = a.k[p];
      int granules = k.columns * k.width / 32;
      alignas(64) int32_t sum[QUERIES * TILE] = {};
      const uint8_t* data = k.data + b * k.batch_stride + h * k.head_stride + t / TILE * k.tile_stride;
      int64_t at = int64_t(q0) * k.columns;
      tile(a.isa, true, k.width, data, 64, granules, &query.hi[p][at], &query.lo[p][at], k.columns, nq, sum);
      for (int q = 0; q < nq; q++) {
        float unit = query.scale[p * a.queries + q0 + q];
        for (int i = 0; i < TILE; i++) dot[q][i] = (p ? dot[q][i] : 0.0f) + unit * sum[q * TILE + i];
      }
    }
    for (int q = 0; q < nq; q++) {
      int64_t at = head * a.queries + q0 + q;
      float bias = a.bias[at], zero_query = a.zero_query[at], gauge = a.gauge[at];
      const float *sig = sigma + (t - t0), *off = offset + (t - t0);
      float* row = s + q * CHUNK + (t - t0);
      for (int i = 0; i < TILE; i++) row[i] = sig[i] * (dot[q][i] + bias) + gauge;
      if (zero)
        for (int i = 0; i < TILE; i++) row[i] += off[i] * zero_query;
    }
  }
  for (int q = 0; q < nq; q++) {  // hide what this query may not see
    int64_t at = int64_t(b) * a.new_tokens + (q0 + q) % a.new_tokens;
    int low = int(std::clamp<int64_t>(a.start[at], t0, t1)), high = int(std::clamp<int64_t>(a.stop[at], t0, t1));
    float* row = s + q * CHUNK;
    for (int t = t0; t < low; t++) row[t - t0] = NEG;
    for (int t = std::max(low, high); t < t1; t++) row[t - t0] = NEG;
    if (a.valid)
      for (int t = t0; t < t1; t++)
        if (!a.valid[b * a.valid_stride + t]) row[t - t0] = NEG;
  }
}

void readout(const Args& a, int b, int h, int nq, int t0, int t1, const float* s, float* acc /* [nq][head_dim] */) {
  int group = a.head_dim / a.groups, top = (1 << a.value_bits) - 1;
  const uint16_t* scale = a.v_scale.data + b * a.v_scale.batch_stride + h * a.v_scale.head_stride;
  const uint16_t* zero = a.v_zero.data ? a.v_zero.data + b * a.v_zero.batch_stride + h * a.v_zero.head_stride : nullptr;
  alignas(64) int8_t hi[QUERIES][WEIGHTS], lo[QUERIES][WEIGHTS];
  for (int first = t0; first < t1; first += WEIGHTS) {
    int n = std::min(WEIGHTS, t1 - first);
    for (int g = 0; g < a.groups; g++) {
      float unit[QUERIES];
      alignas(64) float sigma[WEIGHTS], offset[WEIGHTS];
      halves(scale + first * a.v_scale.token_stride + g, a.v_scale.token_stride, n, sigma);
      if (zero)
        halves(zero + first * a.v_zero.token_stride + g, a.v_zero.token_stride, n, offset);
      else
        std::fill(offset, offset + n, 0.0f);
      for (int q = 0; q < nq; q++) {
        const float* row = s + q * CHUNK + (first - t0);
        alignas(64) float w[WEIGHTS];
        float most = 0, constant = 0;
#pragma omp simd reduction(+ : constant) reduction(max : most)
        for (int i = 0; i < n; i++) {  // a hidden row has weight 0 whatever its bytes hold
          w[i] = row[i] > 0 ? row[i] * sigma[i] : 0.0f;
          constant += row[i] > 0 ? row[i] * offset[i] : 0.0f;
          most = std::max(most, w[i]);
        }
        float inverse = most > 0 ? 16256 / most : 0.0f;
        unit[q] = most / 16256;
        int whole = 0;
        for (int i = 0; i < n; i++) {
          int x = int(std::nearbyint(w[i] * inverse));
          whole += x;
          hi[q][i] = int8_t(x >> 7);
          lo[q][i] = int8_t(x & 127);
        }
        if (!zero) constant = -0.5f * top * unit[q] * whole;  // of the weights as rounded, so that levels stay centred
        for (int d = g * group; d < (g + 1) * group; d++) acc[q * a.head_dim + d] += constant;
      }
      int shift = 0;
      for (int p = 0; p < a.value_planes; p++) {
        const Plane& v = a.v[p];
        int per_tile = 32 / v.width;
        const uint8_t* data = v.data + b * v.batch_stride + h * v.head_stride + first / per_tile * v.tile_stride;
        for (int d = g * group / TILE * TILE; d < (g + 1) * group; d += TILE) {
          alignas(64) int32_t sum[QUERIES * TILE] = {};
          tile(a.isa, false, v.width, data + d * 4, v.tile_stride, n / per_tile, hi[0], lo[0], WEIGHTS, nq, sum);
          for (int q = 0; q < nq; q++)
            for (int i = 0; i < TILE; i++)
              if (d + i >= g * group && d + i < (g + 1) * group)
                acc[q * a.head_dim + d + i] += unit[q] * float(1 << shift) * sum[q * TILE + i];
        }
        shift += v.width;
      }
    }
  }
}

}  // namespace

extern "C" int headq_best_isa() {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
  return 2;
#elif defined(__AVX2__)
  return 1;
#else
  return 0;
#endif
}

extern "C" int headq_args_size() { return int(sizeof(Args)); }

// Returns 1 where memory for partial sums is not to be had.
extern "C" int headq_decode_attention(const Args* args) {
  const Args& a = *args;
  int heads = a.batch * a.kv_heads, chunks = (a.slots + CHUNK - 1) / CHUNK;
  int64_t width = int64_t(a.queries) * (a.head_dim + 2);
  std::vector<Query> queries;
  std::vector<float> parts;
  try {
    queries.resize(heads);
    parts.resize(width * heads * chunks);
  } catch (const std::bad_alloc&) {
    return 1;
  }
#pragma omp parallel num_threads(a.threads)
  {
#pragma omp for schedule(static)
    for (int i = 0; i < heads; i++) prepare(a, i, queries[i]);
#pragma omp for schedule(dynamic) collapse(2)
    for (int i = 0; i < heads; i++)
      for (int c = 0; c < chunks; c++) {
        alignas(64) float s[QUERIES * CHUNK];
        int b = i / a.kv_heads, h = i % a.kv_heads, t0 = c * CHUNK, t1 = std::min(t0 + CHUNK, a.slots);
        float* part = &parts[width * (int64_t(i) * chunks + c)];  // [queries] maxima, [queries] sums, then accumulators
        for (int q0 = 0; q0 < a.queries; q0 += QUERIES) {
          int nq = std::min(QUERIES, a.queries - q0);
          scores(a, queries[i], b, h, q0, nq, t0, t1, s);
          for (int q = 0; q < nq; q++) {
            float *row = s + q * CHUNK, most = NEG, total = 0;
#pragma omp simd reduction(max : most)
            for (int t = 0; t < t1 - t0; t++) most = std::max(most, row[t]);
            if (most == NEG) {
              std::fill(row, row + (t1 - t0), 0.0f);
            } else {
#pragma omp simd reduction(+ : total)
              for (int t = 0; t < t1 - t0; t++) {
                float e = row[t] == NEG ? 0.0f : exp_negative(row[t] - most);
                row[t] = e;
                total += e;
              }
            }
            part[q0 + q] = most;
            part[a.queries + q0 + q] = total;
          }
          readout(a, b, h, nq, t0, t1, s, part + 2 * a.queries + int64_t(q0) * a.head_dim);
        }
      }
#pragma omp for schedule(static)
    for (int i = 0; i < heads; i++)
      for (int q = 0; q < a.queries; q++) {
        const float* first = &parts[width * int64_t(i) * chunks];
        float most = NEG, total = 0, *out = a.out + (int64_t(i) * a.queries + q) * a.head_dim;
        std::fill(out, out + a.head_dim, 0.0f);
        for (int c = 0; c < chunks; c++) most = std::max(most, first[c * width + q]);
        for (int c = 0; c < chunks && most != NEG; c++) {
          const float* part = first + c * width;
          if (part[q] == NEG) continue;
          float factor = std::exp(part[q] - most);
          total += factor * part[a.queries + q];
          for (int d = 0; d < a.head_dim; d++) out[d] += factor * part[2 * a.queries + int64_t(q) * a.head_dim + d];
        }
        a.lse[int64_t(i) * a.queries + q] = most == NEG ? NEG : most + std::log(total);
        for (int d = 0; d < a.head_dim && total > 0; d++) out[d] /= total;
        int64_t at = int64_t(i / a.kv_heads) * a.new_tokens + q % a.new_tokens;
        for (int p = 0; p < a.key_planes; p++)
          if (std::isnan(queries[i].scale[p * a.queries + q]) && a.start[at] < a.stop[at]) {
            std::fill(out, out + a.head_dim, std::numeric_limits<float>::quiet_NaN());
            a.lse[int64_t(i) * a.queries + q] = std::numeric_limits<float>::quiet_NaN();
          }
      }
  }
  return 0;
}
