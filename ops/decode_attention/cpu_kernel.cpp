// decode_attention on the CPU: one segment of packed keys and values, read once per KV head for all its queries; for
// attend, also the exact rows that the same queries see, and the way back from the basis of the values.
// Codes stay integers: a query is 16 bits and a softmax weight 15, as two int8 numbers, and sums are u8 x s8 dot products.
// Layout of the planes: see layout.py. Compiled on first use with -march=native; the code path is chosen at run time
// (isa: 0 portable, 1 AVX2, 2 AVX-512-VNNI), among those this compiler could build.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int TILE = 16;         // tokens of a key granule, channels of a value granule
constexpr int CHUNK = 1024;      // tokens of one unit of work
constexpr int LANES = 2 * TILE;  // of two granules that lie beside each other
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

// Packed rows of neighbouring KV heads, of the same form.
struct Run {
  int32_t first, heads;                                       // of the layer's KV heads
  int32_t key_planes, value_planes, value_bits, groups;
  Plane k[3], v[2];
  Scale k_scale, k_zero, v_scale, v_zero;                     // k_zero.data, v_zero.data may be null
  float q_weight[3];                                          // what a plane's codes count
};

struct Args : Run {
  int32_t batch, kv_heads, queries, slots, head_dim;          // queries: rows per KV head (group x new tokens)
  int32_t threads, isa, new_tokens;
  const float *q[3], *bias, *zero_query, *gauge;              // q[p]: [batch, kv_heads, queries, columns of plane p]
  int64_t q_row[3], scalar_row;                               // elements from one query to the next
  const int64_t *start, *stop;                                // [batch, new_tokens]
  const uint8_t* valid;                                       // [batch, valid_stride] or null
  int64_t valid_stride;
  float *out, *lse;                                           // [batch, kv_heads, queries, head_dim], [.., queries]
  Exact exact;
  const float *read, *mean;                                   // o = read · ŷ + mean, [head_dim, head_dim]; may be null
  int64_t read_batch, read_head, mean_batch, mean_head;
  const float* map;                                           // [head_dim, M + 3], or null; see map_queries
  int64_t map_batch, map_head;
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

// Where a plane or a scale of one KV head begins.
template <class X>
inline auto of_head(const X& x, int b, int h) { return x.data + b * x.batch_stride + h * x.head_stride; }

// Where the rows from slot t on begin, in a plane of keys and in one of values.
inline const uint8_t* keys_from(const Plane& x, int b, int h, int t) { return of_head(x, b, h) + t / TILE * x.tile_stride; }
inline const uint8_t* values_from(const Plane& x, int b, int h, int t) { return of_head(x, b, h) + t / (32 / x.width) * x.tile_stride; }

// The scales or zeros of tokens from t0 on, of one group; nothing where there are none.
void scales(const Scale& x, int b, int h, int t0, int n, int group, float* to) {
  if (x.data) halves(of_head(x, b, h) + t0 * x.token_stride + group, x.token_stride, n, to);
}

// Ask for what will be read soon.
inline void prefetch(const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)from + i);
}

void prefetch(const Scale& x, int b, int h, int t0, int n) {
  if (x.data) prefetch(of_head(x, b, h) + t0 * x.token_stride, n * x.token_stride * 2);
}

// What will be read next, to be asked for little by little: so many bytes of each of two planes at each step.
struct Ahead {
  const uint8_t* at[2] = {};
  int64_t bytes[2] = {};
  void add(int plane, const uint8_t* from, int64_t n, int steps) { at[plane] = from, bytes[plane] = (n / steps + 63) / 64 * 64; }
  void step() {
    for (int i = 0; i < 2; i++) {
      prefetch(at[i], bytes[i]);
      at[i] += bytes[i];
    }
  }
};

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

inline float largest(const float* x, int n) {
  vf top = vf{} + NEG;
  for (int i = 0; i < n; i += TILE) top = max(load<vf>(x + i), top);
  return most_of(top);
}

constexpr float LOG2E = 1.44269504f;

// 2^x for x <= 0, relative error below 1e-6; 0 at -inf.
inline vf exp2_negative(vf x) {
#if defined(__AVX512DQ__)
  vf f = (vf)_mm512_reduce_ps((__m512)x, 1);  // x - floor(x)
#else
  constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest whole number in the low bits
  vf y = max(vf{} - 126.0f, x), n = y - 0.5f + ROUND;
  vf f = y - (n - ROUND);
#endif
  vf p = vf{} + 1.8775767e-3f;
  p = p * f + 8.9893397e-3f;
  p = p * f + 5.5826318e-2f;
  p = p * f + 2.4015361e-1f;
  p = p * f + 6.9315308e-1f;
  p = p * f + 9.9999994e-1f;
#if defined(__AVX512DQ__)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
  vf e = p * (vf)(((vi)n - (vi)(vf{} + ROUND) + 127) << 23);
  return x == NEG ? vf{} : e;
#endif
}

// How a code path takes granules of 64 bytes: BYTES at a time, four of them a lane, of BESIDE granules, bits shifted and
// masked in each, for at most QUERIES queries, whose sums stay in registers.
struct Portable {
  static constexpr int QUERIES = 1, BYTES = 4, BESIDE = 1;
  using Bytes = uint32_t;
  using Sum = int32_t;
  static const int8_t* four(const int8_t* w) { return w; }
  static Bytes bytes(const uint8_t* p) { return load<uint32_t>(p); }
  static Bytes bits(Bytes b, int shift, int mask) { return (shift < 0 ? b << -shift : b >> shift) & (0x01010101u * mask); }
  static Bytes both(Bytes a, Bytes b) { return a | b; }
  static Sum add(Sum sum, Bytes codes, const int8_t* w) {
    for (int i = 0; i < 4; i++) sum += int32_t(codes >> (8 * i) & 255) * w[i];
    return sum;
  }
  static Sum join(Sum hi, Sum lo) { return hi * 256 + lo; }
};

#if defined(__AVX2__)
// GCC keeps some of the sums of an unrolled loop on the stack unless each is asked for.
template <class Sum>
inline Sum in_register(Sum sum) {
  asm("" : "+v"(sum));
  return sum;
}

struct Avx2 {
  static constexpr int QUERIES = 4, BYTES = 32, BESIDE = 1;
  using Bytes = __m256i;
  using Sum = __m256i;
  static Bytes four(const int8_t* w) { return _mm256_set1_epi32(load<int32_t>(w)); }
  static Bytes bytes(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
  static Bytes bits(Bytes b, int shift, int mask) {
    return _mm256_and_si256(shift < 0 ? _mm256_slli_epi16(b, -shift) : _mm256_srli_epi16(b, shift), _mm256_set1_epi8(mask));
  }
  static Bytes both(Bytes a, Bytes b) { return _mm256_or_si256(a, b); }
  static Sum add(Sum sum, Bytes codes, Bytes w) {
    __m256i products = _mm256_maddubs_epi16(codes, w);
    return in_register(_mm256_add_epi32(sum, _mm256_madd_epi16(products, _mm256_set1_epi16(1))));
  }
  static Sum join(Sum hi, Sum lo) { return _mm256_add_epi32(_mm256_slli_epi32(hi, 8), lo); }
};
#endif

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
struct Vnni {
  static constexpr int QUERIES = 4, BYTES = 64, BESIDE = 2;
  using Bytes = __m512i;
  using Sum = __m512i;
  static Bytes four(const int8_t* w) { return _mm512_set1_epi32(load<int32_t>(w)); }
  static Bytes bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static Bytes bits(Bytes b, int shift, int mask) {
    return _mm512_and_si512(shift < 0 ? _mm512_slli_epi16(b, -shift) : _mm512_srli_epi16(b, shift), _mm512_set1_epi8(mask));
  }
  static Bytes both(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }
  static Sum add(Sum sum, Bytes codes, Bytes w) { return in_register(_mm512_dpbusd_epi32(sum, codes, w)); }
  static Sum join(Sum hi, Sum lo) { return _mm512_add_epi32(_mm512_slli_epi32(hi, 8), lo); }
};
#endif

// What codes are multiplied with: numbers of 16 bits, hi·256 + lo. Four numbers of a query lie together, first their hi and
// then their lo; the next query's begin so many bytes further on.
constexpr int FOUR = 8;

// Where granules of 64 bytes lie: of a plane, and of a second one with the codes' higher bits, or null. `next` is how far
// it is to the granule beside, whose lanes are the next sixteen tokens or channels.
struct Granules { const uint8_t* data; int64_t step, next; const uint8_t* high; int64_t high_step, high_next; };

// n granules, and as many beside them, with codes of W bits, and H higher ones, against NQ rows of integers: out[q][lane].
// The factors of a query lie `row` bytes after those of the one before.
template <class I, int W, int H, int NQ>
inline __attribute__((always_inline)) void tile(const Granules& from, int n, const int8_t* factors, int row, Ahead& ahead, int32_t (*out)[CHUNK]) {
  constexpr int P = 8 / W, R = H ? W / H : 1;  // codes in a byte; granules that share one of the second plane
  constexpr int N = I::BESIDE;                 // granules taken at once
  for (int part = 0; part < 128; part += N * I::BYTES) {
    const int in = N == 2 ? 0 : part % 64, beside = part / 64;
    const uint8_t *data = from.data + in + beside * from.next, *above = H ? from.high + in + beside * from.high_next : nullptr;
    typename I::Sum a[N][NQ] = {}, b[N][NQ] = {};
    for (int first = 0; first < n; first += R) {
      if (part == 0) ahead.step();
      typename I::Bytes high[N];
      if constexpr (H > 0)
        for (int i = 0; i < N; i++) high[i] = I::bytes(above + first / R * from.high_step + i * from.high_next);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        typename I::Bytes bytes[N], codes[N];
        for (int i = 0; i < N; i++) bytes[i] = I::bytes(data + (first + r) * from.step + i * from.next);
        const int8_t* w = factors + (first + r) * P * FOUR;
#pragma GCC unroll 8
        for (int p = 0; p < P; p++) {
          for (int i = 0; i < N; i++) {
            codes[i] = I::bits(bytes[i], p * W, (1 << W) - 1);
            if constexpr (H > 0) codes[i] = I::both(codes[i], I::bits(high[i], (r * P + p) * H - W, ((1 << H) - 1) << W));
          }
#pragma GCC unroll 8
          for (int q = 0; q < NQ; q++) {
            const auto x = I::four(w + q * row + p * FOUR), y = I::four(w + q * row + p * FOUR + 4);
            for (int i = 0; i < N; i++) a[i][q] = I::add(a[i][q], codes[i], x), b[i][q] = I::add(b[i][q], codes[i], y);
          }
        }
      }
    }
    for (int q = 0; q < NQ; q++)
      for (int i = 0; i < N; i++) {
        auto sum = I::join(a[i][q], b[i][q]);
        std::memcpy((char*)out[q] + part + 64 * i, &sum, sizeof sum);
      }
  }
}

template <class I, int NQ>
inline __attribute__((always_inline)) void tile(int width, int high, const Granules& from, int n, const int8_t* factors, int row, Ahead& ahead, int32_t (*out)[CHUNK]) {
  switch (width * 8 + high) {
    case 2 * 8: return tile<I, 2, 0, NQ>(from, n, factors, row, ahead, out);
    case 2 * 8 + 1: return tile<I, 2, 1, NQ>(from, n, factors, row, ahead, out);
    case 4 * 8: return tile<I, 4, 0, NQ>(from, n, factors, row, ahead, out);
    default: tile<I, 1, 0, NQ>(from, n, factors, row, ahead, out);
  }
}

// A query as integers: x ≈ scale · (hi·256 + lo), |hi·256 + lo| <= 32512.
float split_query(const float* x, int n, int8_t* to) {
  float most = 0;
  bool finite = true;
  for (int i = 0; i < n; i++) {
    most = std::max(most, std::fabs(x[i]));
    finite = finite && std::isfinite(x[i]);
  }
  const bool none = !finite || most < 1e-30f;
  const float inverse = none ? 0.0f : 32512 / most;
  for (int i = 0; i < n; i++) {
    const int w = none ? 0 : int(std::nearbyint(x[i] * inverse));
    int8_t* at = to + i / 4 * FOUR + i % 4;
    at[0] = int8_t((w + 128) >> 8);
    at[4] = int8_t(w);
  }
  return finite ? none ? 0.0f : most / 32512 : std::numeric_limits<float>::quiet_NaN();  // of a non-finite query, as elsewhere
}

// The queries of one KV head as integers, per plane, and what to multiply their sums with.
struct Query {
  int row;          // bytes of one query's factors
  float* scale;     // [plane][query]
  int8_t* factors;  // [plane][query][row]
  static int row_bytes(const Args& a) {
    int columns = 0;
    for (int p = 0; p < a.key_planes; p++) columns = std::max(columns, a.k[p].columns);
    return columns / 4 * FOUR;
  }
  static int64_t bytes(const Args& a) { return int64_t(a.key_planes) * a.queries * (row_bytes(a) + sizeof(float)); }
  Query(const Args& a, char* memory) : row(row_bytes(a)), scale((float*)memory), factors((int8_t*)(scale + int64_t(a.key_planes) * a.queries)) {}
  int8_t* of(const Args& a, int p, int q) const { return factors + (int64_t(p) * a.queries + q) * row; }
};

// With a map the queries are those of the exact rows, and q, bias, zero_query and gauge are columns of their rows times
// the map: M coordinates, which every plane reads, and three numbers.
int map_columns(const Args& a) { return a.map ? a.k[0].columns + 3 : 0; }

void point_to_mapped(Args& a, float* mapped) {
  const int columns = map_columns(a), m = columns - 3;
  for (int p = 0; p < 3; p++) a.q[p] = mapped, a.q_row[p] = columns;
  a.bias = mapped + m, a.zero_query = mapped + m + 1, a.gauge = mapped + m + 2, a.scalar_row = columns;
}

void map_queries(const Args& a, int64_t head, float* mapped) {
  const int columns = map_columns(a);
  const float* map = a.map + head / a.kv_heads * a.map_batch + head % a.kv_heads * a.map_head;
  for (int64_t i = head * a.queries; i < (head + 1) * a.queries; i++) {
    const float* q = a.exact.q + i * a.exact.q_row;
    float* to = mapped + i * columns;
    std::fill(to, to + columns, 0.0f);
    for (int d = 0; d < a.head_dim; d++) {
      const float x = a.exact.scaling * q[d];
      for (int c = 0; c < columns; c++) to[c] += x * map[d * columns + c];
    }
  }
}

void prepare(const Args& a, int64_t head, const Query& query) {
  for (int p = 0; p < a.key_planes; p++)
    for (int q = 0; q < a.queries; q++) {
      const float* row = a.q[p] + (head * a.queries + q) * a.q_row[p];
      query.scale[p * a.queries + q] = LOG2E * a.q_weight[p] * split_query(row, a.k[p].columns, query.of(a, p, q));
    }
}

// The slots of t0:t1 that a query may see.
struct Range { int low, high; };

Range seen(const Args& a, int b, int q, int t0, int t1) {
  const int64_t at = int64_t(b) * a.new_tokens + q % a.new_tokens;
  const int low = int(std::clamp<int64_t>(a.start[at], t0, t1)), high = int(std::clamp<int64_t>(a.stop[at], t0, t1));
  return {low, std::max(low, high)};
}

// Hide what a query may not see of row[t0:t1].
void hide(const Args& a, int b, Range range, int t0, int t1, float* row) {
  std::fill(row, row + (range.low - t0), NEG);
  std::fill(row + (range.high - t0), row + (t1 - t0), NEG);
  if (a.valid)
    for (int t = t0; t < t1; t++)
      if (!a.valid[b * a.valid_stride + t]) row[t - t0] = NEG;
}

// Scores in units of log 2, and the largest of each query.
template <class I, int NQ>
void scores(const Args& a, const Query& query, int b, int h, int q0, int t0, int t1, float (*s)[CHUNK], float* most) {
  const int64_t head = int64_t(b) * a.kv_heads + a.first + h;
  alignas(64) float sigma[CHUNK], offset[CHUNK];
  alignas(64) int32_t sums[NQ][CHUNK];
  scales(a.k_scale, b, h, t0, t1 - t0, 0, sigma);
  scales(a.k_zero, b, h, t0, t1 - t0, 0, offset);
  // 3 bits of all coordinates: one code from both planes, for half the products.
  const bool joined = a.key_planes == 2 && a.q[0] == a.q[1] && a.k[0].width == 2;
  const Plane& high = a.k[1];
  if (!q0) {
    prefetch(a.v_scale, b, h, t0, t1 - t0);
    prefetch(a.v_zero, b, h, t0, t1 - t0);
    for (int p = 0; p < a.key_planes && !t0; p++) prefetch(keys_from(a.k[p], b, h, 0), int64_t(t1) * a.k[p].columns * a.k[p].width / 8);
  }
  for (int p = 0; p < a.key_planes; p += joined ? 2 : 1) {
    const Plane& k = a.k[p];
    const int n = k.columns * k.width / 32;
    Ahead values;  // of the same tokens
    for (int i = 0; i < a.value_planes && !p && !q0; i++) {
      const Plane& v = a.v[i];
      const int steps = (t1 - t0 + LANES - 1) / LANES * (joined ? n / 2 : n);
      values.add(i, values_from(v, b, h, t0), int64_t(t1 - t0) * a.head_dim * v.width / 8, steps);
    }
    for (int t = t0; t < t1; t += LANES) {
      const bool two = t + TILE < t1;  // else both halves are the same tile
      const Granules from{keys_from(k, b, h, t), 64, two ? k.tile_stride : 0, joined ? keys_from(high, b, h, t) : nullptr, 64, two ? high.tile_stride : 0};
      tile<I, NQ>(k.width, joined ? high.width : 0, from, n, query.of(a, p, q0), query.row, values, (int32_t(*)[CHUNK])(sums[0] + (t - t0)));
    }
    const bool last = p + (joined ? 2 : 1) >= a.key_planes;
    for (int q = 0; q < NQ; q++) {
      const int64_t at = (head * a.queries + q0 + q) * a.scalar_row;
      const float scale = query.scale[p * a.queries + q0 + q], bias = LOG2E * a.bias[at], zero_query = LOG2E * a.zero_query[at], gauge = LOG2E * a.gauge[at];
      vf top = vf{} + NEG;
      for (int t = 0; t < t1 - t0; t += TILE) {
        vf x = scale * to_float(load<vi>(sums[q] + t)) + (p ? load<vf>(s[q] + t) : vf{} + bias);
        if (last) x = load<vf>(sigma + t) * x + gauge;
        if (last && a.k_zero.data) x += load<vf>(offset + t) * zero_query;
        store(s[q] + t, x);
        top = max(x, top);
      }
      most[q] = most_of(top);
    }
  }
}

// Sixteen times four numbers of 0 to 32639 as factors.
inline void split(const vi (&w)[4], int8_t* to) {
#if defined(__AVX512BW__)
  const __m512i x = _mm512_packs_epi32((__m512i)w[0], (__m512i)w[1]), y = _mm512_packs_epi32((__m512i)w[2], (__m512i)w[3]);
  const auto upper = [](__m512i v) { return _mm512_srai_epi16(_mm512_add_epi16(v, _mm512_set1_epi16(128)), 8); };
  const auto lower = [](__m512i v) { return _mm512_srai_epi16(_mm512_slli_epi16(v, 8), 8); };
  const __m512i hi = _mm512_packs_epi16(upper(x), upper(y)), lo = _mm512_packs_epi16(lower(x), lower(y));
  // lanes of 128 bits hold four tokens of each of w[0..3]
  const __m512i in_order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi64(in_order, _mm512_unpacklo_epi32(hi, lo)));
  _mm512_storeu_si512(to + 64, _mm512_permutexvar_epi64(in_order, _mm512_unpackhi_epi32(hi, lo)));
#else
  for (int i = 0; i < 4; i++) {
    vb high = __builtin_convertvector((w[i] + 128) >> 8, vb), low = __builtin_convertvector(w[i], vb);
    for (int j = 0; j < 4; j++) {
      std::memcpy(to + (i * 4 + j) * FOUR, (const char*)&high + 4 * j, 4);
      std::memcpy(to + (i * 4 + j) * FOUR + 4, (const char*)&low + 4 * j, 4);
    }
  }
#endif
}

inline vi rounded(vf x) {
#if defined(__AVX512F__)
  return (vi)_mm512_cvtps_epi32((__m512)x);
#else
  return __builtin_convertvector(x + 0.5f, vi);
#endif
}

// Softmax weights times the scales of the values, as factors in `unit`. What rounding takes from a weight goes to one that
// follows, so that many small weights keep their sum. A row of SCORES becomes its weights 2^(s - most), of that sum.
// Returns what all channels get: the weighted zeros, or where levels are centred, the weights as rounded times the middle
// level; NaN where a weight is none.
template <bool SCORES>
float split_weights(float* row, float most, const float* sigma, const float* offset, int n, int top, float& sum, float& unit, int8_t* to) {
  alignas(64) float w[CHUNK];
  const float from = most == NEG ? 0.0f : most;
  vf total{}, peaks{}, constant{}, all{};
  for (int i = 0; i < n; i += TILE) {
    vf e = load<vf>(row + i);
    if (SCORES) {
      e = exp2_negative(e - from);
      store(row + i, e);
      total += e;
    }
    const vf x = e * load<vf>(sigma + i);
    if (offset) constant += e * load<vf>(offset + i);
    peaks = max(x, peaks);
    all += x;
    store(w + i, x);
  }
  if (SCORES) sum = sum_of(total);
  const float peak = most_of(peaks), inverse = peak > 0 ? 32512 / peak : 0.0f;
  unit = peak / 32512;
  for (; n % 64; n += TILE) store(w + n, vf{});
  vf left[4]{};
  vi whole{};
  for (int i = 0; i < n; i += 64) {
    vi x[4];
    for (int j = 0; j < 4; j++) {
      const vf exact = load<vf>(w + i + j * TILE) * inverse;
      whole += x[j] = rounded(exact > 0 ? exact + left[j] : vf{});  // a hidden row has weight 0 whatever its bytes hold
      left[j] += exact - to_float(x[j]);
    }
    split(x, to + i / 4 * FOUR);
  }
  if (std::isnan(sum_of(all))) return std::numeric_limits<float>::quiet_NaN();
  return offset ? sum_of(constant) : -0.5f * top * unit * sum_of(to_float(whole));
}

// What the values of t0:t1 add to the output, [NQ][head_dim], for scores and their maxima; the sums of the weights.
template <class I, int NQ>
void readout(const Args& a, int b, int h, int q0, int t0, int t1, bool hidden, float (*s)[CHUNK], const float* most, float* sum, float* acc) {
  const int group = a.head_dim / a.groups, top = (1 << a.value_bits) - 1, n = t1 - t0;
  const bool joined = a.value_bits == 3;
  const Plane& high = a.v[1];
  constexpr int WEIGHTS = CHUNK / 4 * FOUR;
  const auto plane = [&](const Plane& x, int d) { return values_from(x, b, h, t0) + d * 4; };
  alignas(64) int8_t factors[NQ * WEIGHTS];
  alignas(64) float sigma[CHUNK], offset[CHUNK];
  std::fill(acc, acc + NQ * a.head_dim, 0.0f);
  Ahead keys, none;  // of the next chunk
  const int more = q0 ? 0 : std::min(a.slots - t1, CHUNK);
  for (int i = 0; i < std::min(a.key_planes, 2) && more; i++) {
    const Plane& k = a.k[i];
    const int steps = n * a.v[0].width / (joined ? 64 : 32) * ((group + LANES - 1) / LANES);
    keys.add(i, keys_from(k, b, h, t1), int64_t(more) * k.columns * k.width / 8, steps);
  }
  prefetch(a.k_scale, b, h, t1, more);
  prefetch(a.k_zero, b, h, t1, more);
  for (int g = 0; g < a.groups; g++) {
    scales(a.v_scale, b, h, t0, n, g, sigma);
    scales(a.v_zero, b, h, t0, n, g, offset);
    if (hidden)  // a hidden row has weight 0, and its scale may be anything
      for (int t = 0; t < n; t++) {
        bool none = true;
        for (int q = 0; q < NQ; q++) none = none && s[q][t] == (g ? 0 : NEG);
        if (none) sigma[t] = offset[t] = 0;
      }
    float unit[NQ], constant[NQ];
    for (int q = 0; q < NQ; q++) {
      const float* offsets = a.v_zero.data ? offset : nullptr;
      constant[q] = (g ? split_weights<false> : split_weights<true>)(s[q], most[q], sigma, offsets, n, top, sum[q], unit[q], factors + q * WEIGHTS);
    }
    const int from = g * group, to = from + group;
    for (int d = from / TILE * TILE; d < to; d += LANES)
      for (int p = 0; p < a.value_planes; p += joined ? 2 : 1) {
        const Plane& v = a.v[p];
        const int next = d + TILE < to ? 64 : 0;  // 0: both halves are the same tile
        const Granules granules{plane(v, d), v.tile_stride, next, joined ? plane(high, d) : nullptr, high.tile_stride, next};
        alignas(64) int32_t sums[NQ][CHUNK];
        tile<I, NQ>(v.width, joined ? high.width : 0, granules, n * v.width / 32, factors, WEIGHTS, p || g ? none : keys, sums);
        for (int q = 0; q < NQ; q++)
          for (int c = d; c < std::min(d + LANES, to); c += TILE) {
            float* at = acc + q * a.head_dim + c;
            const vf x = unit[q] * float(p ? 1 << a.v[0].width : 1) * to_float(load<vi>(sums[q] + (c - d))) + (p ? 0.0f : constant[q]);
            if (from <= c && c + TILE <= to) {
              store(at, load<vf>(at) + x);
            } else {  // groups that cut a tile
              for (int j = std::max(from - c, 0); j < std::min(to - c, TILE); j++) at[j] += x[j];
            }
          }
      }
  }
}

// One unit of work: NQ queries of one head over one chunk. part: [queries] maxima, [queries] sums, then accumulators.
template <class I, int NQ>
void attend_chunk(const Args& a, const Query& query, int b, int h, int q0, int t0, int t1, float* part) {
  alignas(64) float s[NQ][CHUNK];
  float* most = part + q0;
  scores<I, NQ>(a, query, b, h, q0, t0, t1, s, most);
  bool hidden = false;
  for (int q = 0; q < NQ; q++) {
    const Range range = seen(a, b, q0 + q, t0, t1);
    if (a.valid || range.low > t0 || range.high < t1) {
      hide(a, b, range, t0, t1, s[q]);
      most[q] = largest(s[q], t1 - t0);
      hidden = true;
    }
  }
  readout<I, NQ>(a, b, h, q0, t0, t1, hidden, s, most, most + a.queries, part + 2 * a.queries + int64_t(q0) * a.head_dim);
}

// As many queries at a time as the path has registers for.
template <class I, int NQ = I::QUERIES>
void attend_queries(const Args& a, const Query& query, int b, int h, int q0, int t0, int t1, float* part) {
  for (; a.queries - q0 >= NQ; q0 += NQ) attend_chunk<I, NQ>(a, query, b, h, q0, t0, t1, part);
  if constexpr (NQ > 1) attend_queries<I, NQ - 1>(a, query, b, h, q0, t0, t1, part);
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
void attend_exact(const Args& a, int b, int h, float* s /* [queries][rows] */, float* out, float* lse) {
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
    float *w = s + int64_t(i) * n, most = NEG, total = 0;
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

// The best path, or a lower one that HEADQ_CPU_ISA names; -1 where it names none of them.
extern "C" int headq_isa() {
  const char *names[] = {"portable", "avx2", "avx512"}, *wanted = std::getenv("HEADQ_CPU_ISA");
  if (!wanted) return headq_best_isa();
  for (int i = 0; i <= headq_best_isa(); i++)
    if (!std::strcmp(wanted, names[i])) return i;
  return -1;
}

extern "C" int headq_args_size() { return int(sizeof(Args)); }

extern "C" int headq_run_size() { return int(sizeof(Run)); }

// Heads are those of `runs`, or with none all of one form, given in `args`. Returns 1 where memory is not to be had.
extern "C" int headq_decode_attention(const Args* args, const Run* runs, int n) {
  const std::unique_ptr<Args[]> forms(new (std::nothrow) Args[std::max(n, 1)]);
  if (!forms) return 1;
  forms[0] = *args;
  int64_t bytes = 0;
  for (int r = 0; r < std::max(n, 1); r++) {
    if (n) static_cast<Run&>(forms[r] = *args) = runs[r];
    bytes = std::max(bytes, Query::bytes(forms[r]));
  }
  const Args& a = *args;
  const auto form = [&](int i) -> const Args& {
    int r = 0;
    while (r < n - 1 && i % a.kv_heads >= forms[r].first + forms[r].heads) r++;
    return forms[r];
  };
  int heads = a.batch * a.kv_heads, chunks = (a.slots + CHUNK - 1) / CHUNK;
  int64_t width = int64_t(a.queries) * (a.head_dim + 2);
  const int64_t exact_width = a.exact.dtype ? int64_t(a.queries) * (a.head_dim + 1 + a.exact.rows) : 0;
  const std::unique_ptr<float[]> parts(new (std::nothrow) float[heads * (width * chunks + exact_width)]);
  const std::unique_ptr<char[]> memory(new (std::nothrow) char[heads * bytes]);
  const std::unique_ptr<float[]> mapped(new (std::nothrow) float[int64_t(heads) * a.queries * map_columns(forms[0])]);
  if (!parts || !memory || !mapped) return 1;
  for (int r = 0; r < std::max(n, 1) && a.map; r++) point_to_mapped(forms[r], mapped.get());
  float* exacts = parts.get() + heads * width * chunks;
#pragma omp parallel num_threads(a.threads)
  {
#pragma omp for schedule(static)
    for (int i = 0; i < heads; i++) {
      if (a.map) map_queries(form(i), i, mapped.get());
      prepare(form(i), i, Query(form(i), memory.get() + i * bytes));
    }
// neighbouring chunks go to one thread, which has asked for what follows
#pragma omp for schedule(guided) collapse(2)
    for (int i = 0; i < heads; i++)
      for (int c = 0; c < chunks; c++) {
        const Args& of = form(i);
        const int b = i / a.kv_heads, h = i % a.kv_heads - of.first, t0 = c * CHUNK;
        attend_chunk(of, Query(of, memory.get() + i * bytes), b, h, t0, std::min(t0 + CHUNK, a.slots), &parts[width * (int64_t(i) * chunks + c)]);
      }
#pragma omp for schedule(static)
    for (int i = 0; i < heads; i++) {
      const int b = i / a.kv_heads, h = i % a.kv_heads;
      const Args& of = form(i);
      const Query query(of, memory.get() + i * bytes);
      float* exact = a.exact.dtype ? exacts + i * exact_width : nullptr;
      float *exact_lse = exact + int64_t(a.queries) * a.head_dim, *weights = exact_lse + a.queries;
      if (exact) attend_exact(a, b, h, weights, exact, exact_lse);
      for (int q = 0; q < a.queries; q++) {
        const float* first = parts.get() + width * int64_t(i) * chunks;
        float most = NEG, total = 0, *out = a.out + (int64_t(i) * a.queries + q) * a.head_dim;
        float& lse = a.lse[int64_t(i) * a.queries + q];
        std::fill(out, out + a.head_dim, 0.0f);
        for (int c = 0; c < chunks; c++) most = std::max(most, first[c * width + q]);
        for (int c = 0; c < chunks && most != NEG; c++) {
          const float* part = first + c * width;
          if (part[q] == NEG) continue;
          float factor = std::exp2(part[q] - most);
          total += factor * part[a.queries + q];
          for (int d = 0; d < a.head_dim; d++) out[d] += factor * part[2 * a.queries + int64_t(q) * a.head_dim + d];
        }
        lse = most == NEG ? NEG : most / LOG2E + std::log(total);
        for (int d = 0; d < a.head_dim && total > 0; d++) out[d] /= total;
        int64_t at = int64_t(b) * a.new_tokens + q % a.new_tokens;
        bool bad = std::isnan(total);
        for (int p = 0; p < of.key_planes; p++) bad = bad || (std::isnan(query.scale[p * a.queries + q]) && a.start[at] < a.stop[at]);
        if (bad) {
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
