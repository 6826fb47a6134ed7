// decode_attention on the CPU: one segment of packed keys and values, read once per KV head for all its queries; for
// attend, also the exact rows that the same queries see, and the way back from the basis of the values.
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
constexpr int COLUMNS = 1088;  // room for a key plane: two pieces of 256 base and 256 side coordinates; no power of two
constexpr float NEG = -std::numeric_limits<float>::infinity();

struct Plane { const uint8_t* data; int64_t batch_stride, head_stride, tile_stride; int32_t width, columns; };
struct Scale { const uint16_t* data; int64_t batch_stride, head_stride, token_stride; };

// Exact rows [rows, head_dim] of each KV head; dtype 0: none, 1: fp32, 2: bf16, 3: fp16.
struct Exact {
  const void *k, *v;
  int64_t k_batch, k_head, k_token, v_batch, v_head, v_token, q_row;
  const float* q;                                             // [batch, kv_heads, queries, head_dim]
  const int64_t *start, *stop;                                // [batch, new_tokens]
  int32_t dtype, rows;
  float scaling;                                              // of the scores
};

struct Args {
  int32_t batch, kv_heads, queries, slots, head_dim;  // queries: rows per KV head (group x new tokens)
  int32_t key_planes, value_planes, value_bits, groups, threads, isa, new_tokens;
  Plane k[3], v[2];
  Scale k_scale, k_zero, v_scale, v_zero;                     // k_zero.data, v_zero.data may be null
  const float *q[3], *bias, *zero_query, *gauge;              // q[p]: [batch, kv_heads, queries, columns of plane p]
  int64_t q_row[3], scalar_row;                               // elements from one query to the next
  float q_weight[3];                                          // what a plane's codes count
  const int64_t *start, *stop;                                // [batch, new_tokens]
  const uint8_t* valid;                                       // [batch, valid_stride] or null
  int64_t valid_stride;
  float *out, *lse;                                           // [batch, kv_heads, queries, head_dim], [.., queries]
  Exact exact;
  const float *read, *mean;                                   // o = read · ŷ + mean, [head_dim, head_dim]; may be null
  int64_t read_batch, read_head, mean_batch, mean_head;
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

// Sixteen lanes at a time: tokens of a key tile, channels of a value tile.
typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef int8_t vb __attribute__((vector_size(16)));

template <class V>
inline V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}
inline void store(void* to, vf v) { std::memcpy(to, &v, sizeof v); }
inline vf to_float(vi x) { return __builtin_convertvector(x, vf); }
inline vf max(vf x, vf y) { return x > y ? x : y; }
#if defined(__AVX512F__)
inline float most_of(vf v) { return _mm512_reduce_max_ps((__m512)v); }
inline float sum_of(vf v) { return _mm512_reduce_add_ps((__m512)v); }
#else
inline float most_of(vf v) {
  float most = v[0];
  for (int i = 1; i < TILE; i++) most = std::max(most, v[i]);
  return most;
}
inline float sum_of(vf v) {
  float sum = v[0];
  for (int i = 1; i < TILE; i++) sum += v[i];
  return sum;
}
#endif

constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest whole number in the low bits
inline vi low_bits(vf rounded) { return (vi)rounded - (vi)(vf{} + ROUND); }

// exp for x <= 0, relative error below 3e-7; 0 at -inf.
inline vf exp_negative(vf x) {
  vf y = max(x, vf{} - 87.0f) * 1.44269504f, n = y + ROUND;
  vf f = y - (n - ROUND), p = vf{} + 1.5353362e-4f;
  p = p * f + 1.3398874e-3f;
  p = p * f + 9.6184370e-3f;
  p = p * f + 5.5503324e-2f;
  p = p * f + 2.4022648e-1f;
  p = p * f + 6.9314720e-1f;
  p = p * f + 1.0f;
  vf e = p * (vf)((low_bits(n) + 127) << 23);
  return x > NEG ? e : vf{};
}

// How a code path takes a granule of 64 bytes: BYTES at a time, four of them a lane, bits shifted and masked in each, for
// at most QUERIES queries, whose sums stay in registers.
struct Portable {
  static constexpr int QUERIES = 1;
  static constexpr int BYTES = 4;
  using Bytes = uint32_t;
  using Sum = int32_t;
  static Bytes bytes(const uint8_t* p) { return load<uint32_t>(p); }
  static Bytes bits(Bytes b, int shift, int mask) { return (shift < 0 ? b << -shift : b >> shift) & (0x01010101u * mask); }
  static Bytes both(Bytes a, Bytes b) { return a | b; }
  static Sum add(Sum sum, Bytes codes, const int8_t* w) {
    for (int i = 0; i < 4; i++) sum += int32_t(codes >> (8 * i) & 255) * w[i];
    return sum;
  }
  static Sum join(Sum hi, Sum lo) { return hi * 128 + lo; }
};

#if defined(__AVX2__)
struct Avx2 {
  static constexpr int QUERIES = 4;
  static constexpr int BYTES = 32;
  using Bytes = __m256i;
  using Sum = __m256i;
  static Bytes bytes(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
  static Bytes bits(Bytes b, int shift, int mask) {
    return _mm256_and_si256(shift < 0 ? _mm256_slli_epi16(b, -shift) : _mm256_srli_epi16(b, shift), _mm256_set1_epi8(mask));
  }
  static Bytes both(Bytes a, Bytes b) { return _mm256_or_si256(a, b); }
  static Sum add(Sum sum, Bytes codes, const int8_t* w) {
    __m256i products = _mm256_maddubs_epi16(codes, _mm256_set1_epi32(load<int32_t>(w)));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(products, _mm256_set1_epi16(1)));
  }
  static Sum join(Sum hi, Sum lo) { return _mm256_add_epi32(_mm256_slli_epi32(hi, 7), lo); }
};
#endif

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
struct Vnni {
  static constexpr int QUERIES = 8;
  static constexpr int BYTES = 64;
  using Bytes = __m512i;
  using Sum = __m512i;
  static Bytes bytes(const uint8_t* p) {
    _mm_prefetch((const char*)p + 4096, _MM_HINT_T0);
    return _mm512_loadu_si512(p);
  }
  static Bytes bits(Bytes b, int shift, int mask) {
    return _mm512_and_si512(shift < 0 ? _mm512_slli_epi16(b, -shift) : _mm512_srli_epi16(b, shift), _mm512_set1_epi8(mask));
  }
  static Bytes both(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }
  static Sum add(Sum sum, Bytes codes, const int8_t* w) { return _mm512_dpbusd_epi32(sum, codes, _mm512_set1_epi32(load<int32_t>(w))); }
  static Sum join(Sum hi, Sum lo) { return _mm512_add_epi32(_mm512_slli_epi32(hi, 7), lo); }
};
#endif

// Where granules of 64 bytes lie: of a plane, and of a second one with the codes' higher bits, or null.
struct Granules { const uint8_t* data; int64_t step; const uint8_t* high; int64_t high_step; };

// n granules with codes of W bits, and H higher ones, against NQ rows of two-plane integers, STRIDE apart: out[q][lane].
template <class I, int W, int H, int NQ, int STRIDE>
inline __attribute__((always_inline)) void tile(const Granules& from, int n, const int8_t* hi, const int8_t* lo, int32_t (*out)[TILE]) {
  constexpr int P = 8 / W, R = H ? W / H : 1;  // codes in a byte; granules that share one of the second plane
  for (int part = 0; part < 64; part += I::BYTES) {
    typename I::Sum a[NQ] = {}, b[NQ] = {};
    for (int first = 0; first < n; first += R) {
      typename I::Bytes high{};
      if constexpr (H > 0) high = I::bytes(from.high + part + first / R * from.high_step);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        auto bytes = I::bytes(from.data + part + (first + r) * from.step);
        const int8_t *h = hi + (first + r) * P * 4, *l = lo + (first + r) * P * 4;
#pragma GCC unroll 8
        for (int p = 0; p < P; p++) {
          auto codes = I::bits(bytes, p * W, (1 << W) - 1);
          if constexpr (H > 0) codes = I::both(codes, I::bits(high, (r * P + p) * H - W, ((1 << H) - 1) << W));
#pragma GCC unroll 8
          for (int q = 0; q < NQ; q++) {
            a[q] = I::add(a[q], codes, h + q * STRIDE + p * 4);
            b[q] = I::add(b[q], codes, l + q * STRIDE + p * 4);
          }
        }
      }
    }
    for (int q = 0; q < NQ; q++) {
      auto sum = I::join(a[q], b[q]);
      std::memcpy((char*)out[q] + part, &sum, sizeof sum);
    }
  }
}

template <class I, int NQ, int STRIDE>
inline __attribute__((always_inline)) void tile(int width, int high, const Granules& from, int n, const int8_t* hi, const int8_t* lo, int32_t (*out)[TILE]) {
  switch (width * 8 + high) {
    case 2 * 8: return tile<I, 2, 0, NQ, STRIDE>(from, n, hi, lo, out);
    case 2 * 8 + 1: return tile<I, 2, 1, NQ, STRIDE>(from, n, hi, lo, out);
    case 4 * 8: return tile<I, 4, 0, NQ, STRIDE>(from, n, hi, lo, out);
    default: tile<I, 1, 0, NQ, STRIDE>(from, n, hi, lo, out);
  }
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
  std::vector<int8_t> hi[3], lo[3];  // [query][COLUMNS]
  std::vector<float> scale;          // [plane][query]
};

void prepare(const Args& a, int64_t head, Query& query) {
  query.scale.resize(3 * a.queries);
  for (int p = 0; p < a.key_planes; p++) {
    query.hi[p].resize(int64_t(COLUMNS) * a.queries);
    query.lo[p].resize(int64_t(COLUMNS) * a.queries);
    for (int q = 0; q < a.queries; q++) {
      int64_t at = int64_t(q) * COLUMNS;
      const float* row = a.q[p] + (head * a.queries + q) * a.q_row[p];
      query.scale[p * a.queries + q] = a.q_weight[p] * split_query(row, a.k[p].columns, &query.hi[p][at], &query.lo[p][at]);
    }
  }
}

// Hide the slots of t0:t1 that a query may not see.
void hide(const Args& a, int b, int q, int t0, int t1, float* row) {
  int64_t at = int64_t(b) * a.new_tokens + q % a.new_tokens;
  int low = int(std::clamp<int64_t>(a.start[at], t0, t1)), high = int(std::clamp<int64_t>(a.stop[at], t0, t1));
  std::fill(row, row + (low - t0), NEG);
  std::fill(row + (std::max(low, high) - t0), row + (t1 - t0), NEG);
  if (a.valid)
    for (int t = t0; t < t1; t++)
      if (!a.valid[b * a.valid_stride + t]) row[t - t0] = NEG;
}

template <class I, int NQ>
void scores(const Args& a, const Query& query, int b, int h, int q0, int t0, int t1, float (*s)[CHUNK]) {
  int64_t head = int64_t(b) * a.kv_heads + h;
  const uint16_t* scale = a.k_scale.data + b * a.k_scale.batch_stride + h * a.k_scale.head_stride;
  const uint16_t* zero = a.k_zero.data ? a.k_zero.data + b * a.k_zero.batch_stride + h * a.k_zero.head_stride : nullptr;
  alignas(64) float sigma[CHUNK], offset[CHUNK];
  halves(scale + t0 * a.k_scale.token_stride, a.k_scale.token_stride, t1 - t0, sigma);
  if (zero) halves(zero + t0 * a.k_zero.token_stride, a.k_zero.token_stride, t1 - t0, offset);
  // 3 bits of all coordinates: one code from both planes, for half the products.
  const bool joined = a.key_planes == 2 && a.q[0] == a.q[1] && a.k[0].width == 2;
  float bias[NQ], zero_query[NQ], gauge[NQ];
  for (int q = 0; q < NQ; q++) {
    int64_t at = (head * a.queries + q0 + q) * a.scalar_row;
    bias[q] = a.bias[at], zero_query[q] = a.zero_query[at], gauge[q] = a.gauge[at];
  }
  for (int t = t0; t < t1; t += TILE) {
    vf dot[NQ];
    for (int q = 0; q < NQ; q++) dot[q] = vf{} + bias[q];
    for (int p = 0; p < a.key_planes; p += joined ? 2 : 1) {
      const Plane& k = a.k[p];
      alignas(64) int32_t sum[NQ][TILE];
      const auto granules = [&](const Plane& x) { return x.data + b * x.batch_stride + h * x.head_stride + t / TILE * x.tile_stride; };
      const Granules from{granules(k), 64, joined ? granules(a.k[1]) : nullptr, 64};
      const int64_t at = int64_t(q0) * COLUMNS;
      tile<I, NQ, COLUMNS>(k.width, joined ? a.k[1].width : 0, from, k.columns * k.width / 32, &query.hi[p][at], &query.lo[p][at], sum);
      for (int q = 0; q < NQ; q++) dot[q] += query.scale[p * a.queries + q0 + q] * to_float(load<vi>(sum[q]));
    }
    vf sig = load<vf>(sigma + (t - t0));
    for (int q = 0; q < NQ; q++) {
      vf row = sig * dot[q] + gauge[q];
      if (zero) row += load<vf>(offset + (t - t0)) * zero_query[q];
      store(s[q] + (t - t0), row);
    }
  }
  for (int q = 0; q < NQ; q++) hide(a, b, q0 + q, t0, t1, s[q]);
}

// Scores to weights exp(s - most), in place.
void softmax(float* row, int n, float& most, float& total) {
  vf top = vf{} + NEG, sum{};
  for (int t = 0; t < n; t += TILE) top = max(load<vf>(row + t), top);
  most = most_of(top);
  const float from = most == NEG ? 0.0f : most;
  for (int t = 0; t < n; t += TILE) {
    vf e = exp_negative(load<vf>(row + t) - from);
    store(row + t, e);
    sum += e;
  }
  total = sum_of(sum);
}

// Softmax weights times the scales of the values, as two 7-bit planes: w = unit * (hi * 128 + lo). Returns what all
// channels get: the weighted zeros, or where levels are centred, the weights as rounded times the middle level.
float split_weights(const float* row, const float* sigma, const float* offset, int n, int top, float& unit, int8_t* hi, int8_t* lo) {
  alignas(64) float w[WEIGHTS];
  vf most{}, constant{};
  for (int i = 0; i < n; i += TILE) {  // a hidden row has weight 0 whatever its bytes hold
    vf e = load<vf>(row + i), x = e > 0 ? e * load<vf>(sigma + i) : vf{};
    if (offset) constant += e > 0 ? e * load<vf>(offset + i) : vf{};
    most = max(x, most);
    store(w + i, x);
  }
  const float largest = most_of(most), inverse = largest > 0 ? 16256 / largest : 0.0f;
  unit = largest / 16256;
  vf whole{};
  for (int i = 0; i < n; i += TILE) {
    vf rounded = load<vf>(w + i) * inverse + ROUND;
    whole += rounded - ROUND;
    vi x = low_bits(rounded);
    vb high = __builtin_convertvector(x >> 7, vb), low = __builtin_convertvector(x & 127, vb);
    std::memcpy(hi + i, &high, TILE);
    std::memcpy(lo + i, &low, TILE);
  }
  return offset ? sum_of(constant) : -0.5f * top * unit * sum_of(whole);
}

template <class I, int NQ>
void readout(const Args& a, int b, int h, int t0, int t1, const float (*s)[CHUNK], float* acc /* [NQ][head_dim] */) {
  const int group = a.head_dim / a.groups, top = (1 << a.value_bits) - 1;
  const uint16_t* scale = a.v_scale.data + b * a.v_scale.batch_stride + h * a.v_scale.head_stride;
  const uint16_t* zero = a.v_zero.data ? a.v_zero.data + b * a.v_zero.batch_stride + h * a.v_zero.head_stride : nullptr;
  const bool joined = a.value_bits == 3;
  alignas(64) int8_t hi[NQ][WEIGHTS], lo[NQ][WEIGHTS];
  alignas(64) float sigma[WEIGHTS], offset[WEIGHTS];
  for (int first = t0; first < t1; first += WEIGHTS) {
    const int n = std::min(WEIGHTS, t1 - first);
    for (int g = 0; g < a.groups; g++) {
      float unit[NQ], constant[NQ];
      halves(scale + first * a.v_scale.token_stride + g, a.v_scale.token_stride, n, sigma);
      if (zero) halves(zero + first * a.v_zero.token_stride + g, a.v_zero.token_stride, n, offset);
      for (int q = 0; q < NQ; q++)
        constant[q] = split_weights(s[q] + (first - t0), sigma, zero ? offset : nullptr, n, top, unit[q], hi[q], lo[q]);
      const int from = g * group, to = from + group;
      for (int d = from / TILE * TILE; d < to; d += TILE) {
        vf sum[NQ];
        for (int q = 0; q < NQ; q++) sum[q] = vf{} + constant[q];
        const auto granules = [&](const Plane& v) {
          return v.data + b * v.batch_stride + h * v.head_stride + first / (32 / v.width) * v.tile_stride + d * 4;
        };
        for (int p = 0; p < a.value_planes; p += joined ? 2 : 1) {
          const Plane& v = a.v[p];
          const Granules from{granules(v), v.tile_stride, joined ? granules(a.v[1]) : nullptr, a.v[1].tile_stride};
          alignas(64) int32_t part[NQ][TILE];
          tile<I, NQ, WEIGHTS>(v.width, joined ? a.v[1].width : 0, from, n * v.width / 32, hi[0], lo[0], part);
          for (int q = 0; q < NQ; q++) sum[q] += unit[q] * float(p ? 1 << a.v[0].width : 1) * to_float(load<vi>(part[q]));
        }
        for (int q = 0; q < NQ; q++) {
          float* at = acc + q * a.head_dim + d;
          if (from <= d && d + TILE <= to) {
            store(at, load<vf>(at) + sum[q]);
          } else {  // groups that cut a tile
            for (int i = std::max(from - d, 0); i < std::min(to - d, TILE); i++) at[i] += sum[q][i];
          }
        }
      }
    }
  }
}

// One unit of work: NQ queries of one head over one chunk. part: [queries] maxima, [queries] sums, then accumulators.
template <class I, int NQ>
void attend_chunk(const Args& a, const Query& query, int b, int h, int q0, int t0, int t1, float* part) {
  alignas(64) float s[NQ][CHUNK];
  scores<I, NQ>(a, query, b, h, q0, t0, t1, s);
  for (int q = 0; q < NQ; q++) softmax(s[q], t1 - t0, part[q0 + q], part[a.queries + q0 + q]);
  readout<I, NQ>(a, b, h, t0, t1, s, part + 2 * a.queries + int64_t(q0) * a.head_dim);
}

// As many queries at a time as the path has registers for.
template <class I, int NQ = I::QUERIES>
void attend_queries(const Args& a, const Query& query, int b, int h, int q0, int t0, int t1, float* part) {
  for (; a.queries - q0 >= NQ; q0 += NQ) attend_chunk<I, NQ>(a, query, b, h, q0, t0, t1, part);
  if constexpr (NQ > 4)
    attend_queries<I, 4>(a, query, b, h, q0, t0, t1, part);
  else if constexpr (NQ > 1)
    attend_queries<I, NQ - 1>(a, query, b, h, q0, t0, t1, part);
}

void attend_chunk(const Args& a, const Query& query, int b, int h, int t0, int t1, float* part) {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
  if (a.isa == 2) return attend_queries<Vnni>(a, query, b, h, 0, t0, t1, part);
#endif
#if defined(__AVX2__)
  if (a.isa >= 1) return attend_queries<Avx2>(a, query, b, h, 0, t0, t1, part);
#endif
  attend_queries<Portable>(a, query, b, h, 0, t0, t1, part);
}

inline float wide(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

void widen(const void* row, int dtype, int n, float* to) {
  const uint16_t* half = (const uint16_t*)row;
  if (dtype == 1) std::memcpy(to, row, n * sizeof(float));
  if (dtype == 2)
    for (int i = 0; i < n; i++) to[i] = wide(uint32_t(half[i]) << 16);
  if (dtype == 3) halves(half, 1, n, to);
}

inline float dot(const float* x, const float* y, int n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < n; i++) sum += x[i] * y[i];
  return sum;
}

// Attention of one KV head's queries over its exact rows: out [queries][head_dim] normalized, and lse.
void attend_exact(const Args& a, int b, int h, std::vector<float>& s, float* out, float* lse) {
  const Exact& e = a.exact;
  const int n = e.rows, d = a.head_dim;
  const int width = e.dtype == 1 ? 4 : 2;
  const char *k = (const char*)e.k + width * (b * e.k_batch + h * e.k_head), *v = (const char*)e.v + width * (b * e.v_batch + h * e.v_head);
  const float* q = e.q + (int64_t(b) * a.kv_heads + h) * a.queries * e.q_row;
  alignas(64) float row[256];
  for (int j = 0; j < n; j++) {
    widen(k + width * j * e.k_token, e.dtype, d, row);
    for (int i = 0; i < a.queries; i++) s[int64_t(i) * n + j] = e.scaling * dot(q + i * e.q_row, row, d);
  }
  std::fill(out, out + int64_t(a.queries) * d, 0.0f);
  for (int i = 0; i < a.queries; i++) {
    int64_t at = int64_t(b) * a.new_tokens + i % a.new_tokens;
    int low = int(std::clamp<int64_t>(e.start[at], 0, n)), high = int(std::clamp<int64_t>(e.stop[at], 0, n));
    float *w = &s[int64_t(i) * n], most = NEG, total = 0;
    bool bad = false;
    for (int j = low; j < high; j++) {
      most = std::max(most, w[j]);
      bad = bad || std::isnan(w[j]);
    }
    for (int j = 0; j < n; j++) w[j] = j < low || j >= high || most == NEG ? 0.0f : std::exp(w[j] - most);
    for (int j = low; j < high; j++) total += w[j];
    lse[i] = bad ? std::numeric_limits<float>::quiet_NaN() : most == NEG ? NEG : most + std::log(total);
    for (int j = low; j < high && total > 0; j++) w[j] /= total;
  }
  for (int j = 0; j < n; j++) {
    widen(v + width * j * e.v_token, e.dtype, d, row);
    for (int i = 0; i < a.queries; i++) {
      float w = s[int64_t(i) * n + j];
      if (w != 0)  // a hidden row may hold anything
        for (int c = 0; c < d; c++) out[int64_t(i) * d + c] += w * row[c];
    }
  }
}

// From the basis of the values to the model's.
void read_back(const Args& a, int b, int h, float* out, float* work) {
  const float* read = a.read + b * a.read_batch + h * a.read_head;
  const float* mean = a.mean ? a.mean + b * a.mean_batch + h * a.mean_head : nullptr;
  for (int c = 0; c < a.head_dim; c++) work[c] = dot(read + c * a.head_dim, out, a.head_dim) + (mean ? mean[c] : 0.0f);
  std::copy(work, work + a.head_dim, out);
}

// Join attention over exact rows to that over packed ones, by log-sum-exp.
void join(float* out, float& lse, const float* other, float other_lse, int n) {
  float most = std::max(lse, other_lse), nan = std::numeric_limits<float>::quiet_NaN();
  if (std::isnan(lse) || std::isnan(other_lse)) {
    std::fill(out, out + n, nan);
    lse = nan;
    return;
  }
  if (most == NEG) return;
  float mine = lse == NEG ? 0.0f : std::exp(lse - most), theirs = other_lse == NEG ? 0.0f : std::exp(other_lse - most);
  for (int c = 0; c < n; c++) out[c] = (mine * out[c] + theirs * other[c]) / (mine + theirs);
  lse = most + std::log(mine + theirs);
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
  std::vector<float> parts, exacts;
  try {
    queries.resize(heads);
    parts.resize(width * heads * chunks);
    if (a.exact.dtype) exacts.resize(int64_t(heads) * a.queries * (a.head_dim + 1));
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
        int t0 = c * CHUNK;
        attend_chunk(a, queries[i], i / a.kv_heads, i % a.kv_heads, t0, std::min(t0 + CHUNK, a.slots), &parts[width * (int64_t(i) * chunks + c)]);
      }
#pragma omp for schedule(static)
    for (int i = 0; i < heads; i++) {
      const int b = i / a.kv_heads, h = i % a.kv_heads;
      float* exact = a.exact.dtype ? &exacts[int64_t(i) * a.queries * (a.head_dim + 1)] : nullptr;
      float* exact_lse = exact + int64_t(a.queries) * a.head_dim;
      if (exact) {
        std::vector<float> weights(int64_t(a.queries) * a.exact.rows);
        attend_exact(a, b, h, weights, exact, exact_lse);
      }
      for (int q = 0; q < a.queries; q++) {
        const float* first = parts.data() + width * int64_t(i) * chunks;
        float most = NEG, total = 0, *out = a.out + (int64_t(i) * a.queries + q) * a.head_dim;
        float& lse = a.lse[int64_t(i) * a.queries + q];
        std::fill(out, out + a.head_dim, 0.0f);
        for (int c = 0; c < chunks; c++) most = std::max(most, first[c * width + q]);
        for (int c = 0; c < chunks && most != NEG; c++) {
          const float* part = first + c * width;
          if (part[q] == NEG) continue;
          float factor = std::exp(part[q] - most);
          total += factor * part[a.queries + q];
          for (int d = 0; d < a.head_dim; d++) out[d] += factor * part[2 * a.queries + int64_t(q) * a.head_dim + d];
        }
        lse = most == NEG ? NEG : most + std::log(total);
        for (int d = 0; d < a.head_dim && total > 0; d++) out[d] /= total;
        int64_t at = int64_t(b) * a.new_tokens + q % a.new_tokens;
        for (int p = 0; p < a.key_planes; p++)
          if (std::isnan(queries[i].scale[p * a.queries + q]) && a.start[at] < a.stop[at]) {
            std::fill(out, out + a.head_dim, std::numeric_limits<float>::quiet_NaN());
            lse = std::numeric_limits<float>::quiet_NaN();
          }
        alignas(64) float work[256];
        if (a.read && lse != NEG) read_back(a, b, h, out, work);
        if (exact) join(out, lse, exact + int64_t(q) * a.head_dim, exact_lse[q], a.head_dim);
      }
    }
  }
  return 0;
}
