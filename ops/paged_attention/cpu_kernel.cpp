// paged_attention on the CPU: packed keys and values in pages, read once per KV head for all its queries, and tokens in full
// precision: sinks, a ring of the newest, the call's own. See types.py for what lies where and reference.py for the equations.
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
#include <omp.h>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int TILE = 16;           // tokens of a key granule, channels of a value granule
constexpr int CHUNK = 1024;        // tokens of one unit of work
constexpr int LANES = 2 * TILE;    // of two granules that lie beside each other
constexpr int LEAST_PAGE = 16;     // tokens
constexpr int LEAST_GRANULE = 8;   // tokens of a value granule
constexpr int LARGEST_DIM = 576;
constexpr int MOST_COLUMNS = 2 * LARGEST_DIM;  // of a plane of keys
constexpr int MOST_ROWS = 4;       // queries at a time
constexpr float NEG = -std::numeric_limits<float>::infinity();

// Of a page: tiles of 16 tokens of keys, granules of values.
struct Plane { const uint8_t* data; int64_t page_stride, head_stride, tile_stride; int32_t width, columns; };
struct Scale { const uint8_t* data; int64_t page_stride, head_stride, token_stride; int32_t bytes, padding; };  // of fp16 (2 bytes) or a byte: see rounding.py

// Vectors [batch, heads, tokens, dim] in full precision; dtype 1: fp32, 2: bf16, 3: fp16.
struct Dense { const void* data; int64_t batch_stride, head_stride, token_stride; int32_t dtype, tokens; };

// Of [batch or 1, kv_heads or 1, ..].
struct PerHead { const float* data; int64_t batch_stride, head_stride; };

// Neighbouring KV heads whose codes have the same form.
struct Group {
  int32_t first, heads;                                       // of the layer's KV heads
  int32_t key_planes, value_planes, value_bits, groups;
  int32_t dense, same_query;                                  // pages of a head lie side by side; all planes read the query as it is
  int32_t shared;                                             // values are their keys: no v[..].data, and v_scale is k_scale
  Plane k[3], v[2];
  Scale k_scale, k_zero, v_scale, v_zero;                     // k_zero.data, v_zero.data may be null
  float q_weight[3];                                          // what a plane's codes count
  const int32_t* q_column[3];                                 // else: the coordinate of each column, M for none,
  const float* q_factor[3];                                   // and what it is multiplied with
};

struct Args {
  Dense q, window_k, window_v, new_k, new_v;                  // new_k.data, new_v.data may be null
  Dense sink_k, sink_v;                                       // with a window_table: pages [pages, heads, n_sink, dim]
  Dense out;                                                  // [batch, query heads, new_tokens, value_dim]
  const int32_t *table, *segment;                             // [batch, columns]; [physical pages] or null
  const int32_t* window_table;                                // [batch, ..], pages of window_k and window_v, or null: a ring of each sequence
  int64_t table_row, window_row;
  const int64_t *packed, *held, *total, *new_start;           // [batch]; new_start may be null
  const int64_t *low, *high;                                  // [batch, new_tokens], or null: causal, under `sliding`
  int64_t* reads;                                             // [2], or null
  PerHead map, read, mean;                                    // map: [segments] of [key_dim, M + 3]; read, of [value_dim, value_dim], transposed, and mean may be null
  int64_t map_segment;                                        // with a frame, rows of the map lie map_row numbers apart, whole vectors
  const float* mapped;                                        // [segments, batch, kv_heads, queries, M + 3], or null: the kernel maps
  float* lse;                                                 // [batch, kv_heads, queries] or null
  const int64_t* query_start;                                 // [batch + 1], or null: sequences of unequal new tokens, one after the other in q and out
  const float* frame;                                         // [frames, 2, key_dim], or null: see SegmentFrame
  const int32_t* partner;                                     // [key_dim]
  const Group* groups;
  int32_t n_groups, batch, kv_heads, queries, new_tokens;     // queries: rows per KV head (group x new tokens)
  int32_t key_dim, value_dim, coordinates, segments;          // coordinates: M
  int32_t page_tokens, columns, n_sink, body, sliding, threads, frames, frame_tokens, map_row;  // body: position of the first token in pages
  int32_t recent;                                             // see PagedKV.recent; -1: none
  float scaling, softcap;                                     // softcap of the scores; 0: none
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

inline void halves(const uint16_t* from, int64_t stride, int n, float* to) {
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

inline void byte_scales(const uint8_t* from, int64_t stride, int n, float* to) {
  constexpr uint32_t LEAST = 0x3d800000u;  // bits of 1/16
  int i = 0;
#if defined(__AVX512F__)
  if (stride == 1)
    for (; i + 16 <= n; i += 16) {
      const __m512i bits = _mm512_slli_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(from + i))), 18);
      _mm512_storeu_si512(to + i, _mm512_add_epi32(bits, _mm512_set1_epi32(LEAST)));
    }
#elif defined(__AVX2__)
  if (stride == 1)
    for (; i + 8 <= n; i += 8) {
      const __m256i bits = _mm256_slli_epi32(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(from + i))), 18);
      _mm256_storeu_si256((__m256i*)(to + i), _mm256_add_epi32(bits, _mm256_set1_epi32(LEAST)));
    }
#endif
  for (; i < n; i++) {
    const uint32_t bits = (uint32_t(from[i * stride]) << 18) + LEAST;
    std::memcpy(to + i, &bits, 4);
  }
}

// The physical pages of a chunk of body tokens, in order.
struct Pages {
  const int32_t* at;
  int n;
  int32_t tokens, shift;  // of a page, and its logarithm
  bool side_by_side;
  int32_t wrapped[CHUNK / LEAST_PAGE];

  Pages(const Args& a, bool dense, int b, int t0, int t1) : tokens(a.page_tokens), shift(__builtin_ctz(tokens)) {
    n = (t1 - t0 + tokens - 1) >> shift;
    const int32_t* row = a.table + b * a.table_row;
    const int first = (t0 >> shift) % a.columns;
    at = row + first;
    if (first + n > a.columns) {
      for (int i = 0; i < n; i++) wrapped[i] = row[(first + i) % a.columns];
      at = wrapped;
    }
    int32_t other = 0;
    for (int i = 0; i < n; i++) other |= at[i] - at[0] - i;
    side_by_side = dense && !other;
  }
  // How many pages from page i on lie side by side.
  int beside(int i) const { return side_by_side ? n - i : 1; }
};

// Where a plane, a scale of one KV head begins in a page.
template <class X>
inline auto of_page(const X& x, int32_t page, int h) { return x.data + page * x.page_stride + h * x.head_stride; }
inline const uint8_t* of_page(const Scale& x, int32_t page, int h) { return x.data + x.bytes * (page * x.page_stride + h * x.head_stride); }

// Where the tile of keys lies that begins with token t of a chunk.
inline const uint8_t* keys_at(const Plane& x, const Pages& pages, int h, int t) {
  const int page = pages.side_by_side ? 0 : t >> pages.shift;
  return of_page(x, pages.at[page], h) + (t - (page << pages.shift)) / TILE * x.tile_stride;
}

// How far from the first page each granule of a plane of values lies that is in a chunk of n tokens.
void value_steps(const Plane& x, const Pages& pages, int n, int64_t* to) {
  const int granule = 32 / x.width, a_page = pages.tokens / granule;
  if (pages.side_by_side) {
    for (int i = 0; i < n / granule; i++) to[i] = i * x.tile_stride;
    return;
  }
  for (int i = 0; i < n / granule; i += a_page) {
    const int64_t page = (pages.at[i / a_page] - int64_t(pages.at[0])) * x.page_stride;
    for (int j = 0; j < a_page; j++) to[i + j] = page + j * x.tile_stride;
  }
}

// The scales or zeros of n tokens of a chunk from token t on (the first of a page), of one group; nothing where there are none.
void scales(const Scale& x, const Pages& pages, int h, int t, int n, int group, float* to) {
  if (!x.data) return;
  for (int i = 0, m; i < n; i += m) {
    const int page = (t + i) >> pages.shift;
    m = std::min(pages.beside(page) << pages.shift, n - i);
    const uint8_t* from = of_page(x, pages.at[page], h) + x.bytes * group;
    if (x.bytes == 1) byte_scales(from, x.token_stride, m, to + i);
    else halves((const uint16_t*)from, x.token_stride, m, to + i);
  }
}

// Ask for what will be read soon.
inline void prefetch(const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)from + i);
}

void prefetch(const Scale& x, const Pages& pages, int h, int n) {
  if (!x.data) return;
  for (int i = 0, t = 0; t < n; i += pages.beside(i), t = i * pages.tokens)
    prefetch(of_page(x, pages.at[i], h), std::min(pages.beside(i) * pages.tokens, n - t) * x.token_stride * x.bytes);
}

// What will be read next, to be asked for little by little: that many bytes of each of two planes at each step, page by page.
struct Ahead {
  struct Part {
    const uint8_t *at = nullptr, *end = (const uint8_t*)UINTPTR_MAX;  // of the pages that lie side by side
    int64_t bytes = 0;
    const Plane* plane = nullptr;
    const Pages* pages = nullptr;
    int head = 0, page = 0;
    inline __attribute__((always_inline)) void step() {
      prefetch(at, bytes);
      at += bytes;
      if (__builtin_expect(at >= end, 0)) turn(page + pages->beside(page));
    }
    inline __attribute__((always_inline)) void turn(int to) {
      page = std::min(to, pages->n - 1);
      at = of_page(*plane, pages->at[page], head);
      end = at + int64_t(pages->beside(page)) * pages->tokens * plane->columns * plane->width / 8;
    }
  };
  Part first, second;
  void add(const Plane& plane, const Pages& pages, int head, int tokens, int steps) {
    Part& x = first.plane ? second : first;
    x.plane = &plane, x.pages = &pages, x.head = head;
    x.bytes = (int64_t(tokens) * plane.columns * plane.width / 8 / steps + 63) / 64 * 64;
    x.turn(0);
  }
  inline __attribute__((always_inline)) void step() {
    first.step();
    second.step();
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

// Scores under a softcap, limit · tanh(x / limit) = limit · (1 - e) / (1 + e) for x >= 0 with e = exp(-2 x / limit); `limit` is in the unit of x.
inline vf capped(vf x, float limit) {
  const vf size = x < 0 ? -x : x, e = exp2_negative(size * (-2 * LOG2E / limit)), y = limit * (1 - e) / (1 + e);
  return x < 0 ? -y : y;
}

// The largest of n scores that become capped.
float cap(float* x, int64_t n, float limit) {
  vf top = vf{} + NEG;
  int64_t i = 0;
  for (; i + TILE <= n; i += TILE) {
    const vf y = capped(load<vf>(x + i), limit);
    store(x + i, y);
    top = max(y, top);
  }
  for (; i < n; i++) x[i] = capped(vf{} + x[i], limit)[0];
  return most_of(top);
}

// What codes are multiplied with: numbers of 16 bits, hi·256 + lo. Four numbers of a query lie together, first their hi and
// then their lo; the next query's begin that many bytes further on.
constexpr int FOUR = 8;

// Where granules of 64 bytes lie: of a plane, and of a second one with the codes' higher bits, or null: how far each is from
// `data` and `high`. `next` is how far it is to the granule beside, whose lanes are the next sixteen tokens or channels.
struct Granules {
  const uint8_t* data; const int64_t* steps; int64_t next;
  const uint8_t* high; const int64_t* high_steps; int64_t high_next;
};

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
        for (int i = 0; i < N; i++) high[i] = I::bytes(above + from.high_steps[first / R] + i * from.high_next);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        typename I::Bytes bytes[N], codes[N];
        for (int i = 0; i < N; i++) bytes[i] = I::bytes(data + from.steps[first + r] + i * from.next);
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

// Sixteen times four numbers of at most 32639 as factors.
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

// A query as integers: x ≈ scale · (hi·256 + lo), |hi·256 + lo| <= 32512.
float split_query(const float* x, int n, int8_t* to) {
  int32_t bits = 0;  // of the largest, and of what is no number
  for (int i = 0; i < n; i++) {
    int32_t own;
    std::memcpy(&own, x + i, 4);
    bits = std::max(bits, own & 0x7fffffff);
  }
  float most;
  std::memcpy(&most, &bits, 4);
  const bool finite = bits < 0x7f800000, none = !finite || most < 1e-30f;
  const float inverse = none ? 0.0f : 32512 / most;
  int i = 0;
#if defined(__AVX512BW__)
  for (; i + 64 <= n && !none; i += 64) {
    vi w[4];
    for (int j = 0; j < 4; j++) w[j] = (vi)_mm512_cvtps_epi32(_mm512_loadu_ps(x + i + j * TILE) * inverse);
    split(w, to + i / 4 * FOUR);
  }
#endif
  for (; i < n; i++) {
    const int w = none ? 0 : int(std::nearbyint(x[i] * inverse));
    int8_t* at = to + i / 4 * FOUR + i % 4;
    at[0] = int8_t((w + 128) >> 8);
    at[4] = int8_t(w);
  }
  return finite ? none ? 0.0f : most / 32512 : std::numeric_limits<float>::quiet_NaN();  // of a non-finite query, as elsewhere
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

// What is visible of one sequence: body tokens from:to in pages, of which first:coded are read there, in chunks; tokens in full
// precision in pieces, neighbours in memory, of batch entry or page `at`.
struct Piece { const Dense *k, *v; int64_t at, slot, position; int n; };
struct Sequence {
  int64_t first, coded;
  int from, to, chunks, rows;
  int64_t before;                                             // chunks of the sequences before it
  std::vector<Piece> piece;
};

// Positions low:high that a query sees, those below `codes` as codes, sinks apart.
struct Positions { int64_t low, high, codes; };

inline Positions visible(const Args& a, int b, int s) {
  const int64_t at = int64_t(b) * a.new_tokens + s, position = a.total[b] - a.new_tokens + s;
  Positions x{a.sliding ? std::max<int64_t>(position - a.sliding + 1, 0) : 0, std::max<int64_t>(position + 1, 0), a.packed[b] + a.body};
  if (a.low) x.low = a.low[at], x.high = std::max(a.low[at], a.high[at]);
  if (a.recent >= 0) x.codes = std::max(x.codes, x.high - 1 - a.recent);
  return x;
}

// Those of tokens in full precision, which lie from `position` on, sinks apart from others.
inline Positions in_full(const Args& a, Positions x, int64_t position) {
  if (a.recent >= 0 && position >= a.n_sink) x.low = std::max(x.low, x.codes);
  return x;
}

// How many of the positions from:to are among those.
inline int64_t shared(Positions x, int64_t from, int64_t to) {
  return std::max<int64_t>(std::min(x.high, to) - std::max(x.low, from), 0);
}

void add(Sequence& s, Positions all, const Dense& k, const Dense& v, int64_t at, int64_t slot, int64_t position, int64_t n) {
  const int64_t skip = std::max<int64_t>(all.low - position, 0), stop = std::min(n, all.high - position);
  if (!k.data || stop <= skip) return;
  s.piece.push_back({&k, &v, at, slot + skip, position + skip, int(stop - skip)});
  s.rows += int(stop - skip);
}

Sequence sequence(const Args& a, int b) {
  Sequence s{};
  constexpr int64_t END = std::numeric_limits<int64_t>::max();
  Positions all{END, 0, 0}, near{END, 0, 0};  // near: those in full precision, sinks apart
  for (int i = 0; i < a.new_tokens; i++) {
    const Positions x = visible(a, b, i);
    if (x.low >= x.high) continue;
    all = {std::min(all.low, x.low), std::max(all.high, x.high), std::max(all.codes, x.codes)};
    near = {std::min(near.low, in_full(a, x, a.n_sink).low), all.high, 0};
  }
  if (all.low >= all.high) return s;
  const int64_t p = a.page_tokens, held = a.held[b], packed = a.packed[b];
  s.coded = all.codes - a.body;
  s.first = std::max<int64_t>(((s.coded + p - 1) / p - a.columns) * p, a.n_sink - a.body);
  const int64_t low = std::max(all.low - a.body, s.first), high = std::min(all.high - a.body, s.coded);
  if (low < high) {
    const int64_t unit = std::min<int64_t>(p, LANES);  // whole tiles and granules
    s.from = int(low / p * p);
    s.to = int((high + unit - 1) / unit * unit);
    s.chunks = (s.to - s.from + CHUNK - 1) / CHUNK;
  }
  if (a.window_table) {
    add(s, all, a.sink_k, a.sink_v, a.table[b * a.table_row], 0, 0, std::min<int64_t>(a.n_sink, held));
    const int64_t size = a.window_k.tokens;
    for (int64_t t = std::max<int64_t>(packed, a.n_sink), n; t < held; t += n) {
      n = std::min(held - t, size - t % size);
      add(s, near, a.window_k, a.window_v, a.window_table[b * a.window_row + t / size], t % size, t, n);
    }
  } else {
    const int64_t ring = a.window_k.tokens - a.n_sink, body = std::max<int64_t>(held - a.n_sink, 0);
    add(s, all, a.window_k, a.window_v, b, 0, 0, std::min<int64_t>(a.n_sink, held));
    for (int64_t j = std::max({body - ring, packed, int64_t(0)}), n; j < body; j += n) {
      n = std::min(body - j, ring - j % ring);
      add(s, near, a.window_k, a.window_v, b, a.n_sink + j % ring, a.n_sink + j, n);
    }
  }
  const int64_t start = a.new_start ? a.new_start[b] : 0;
  const int64_t fresh = std::max<int64_t>(std::min(a.total[b] - held, a.new_k.tokens - start), 0), sinks = std::clamp<int64_t>(a.n_sink - held, 0, fresh);
  add(s, all, a.new_k, a.new_v, b, start, held, sinks);
  add(s, near, a.new_k, a.new_v, b, start + sinks, held + sinks, fresh - sinks);
  return s;
}

// Of packed tokens, and of all, that queries see.
void count(const Args& a, const Sequence& s, int b) {
  for (int i = 0; i < a.new_tokens; i++) {
    const Positions x = visible(a, b, i);
    int64_t n = shared(x, a.body + s.first, x.codes);
    a.reads[0] += n;
    for (const Piece& p : s.piece) n += shared(in_full(a, x, p.position), p.position, p.position + p.n);
    a.reads[1] += n;
  }
}

// The queries of one KV head as integers, per plane, and what to multiply their sums with.
struct Query {
  int n, row;       // queries; bytes of one query's factors
  float* scale;     // [plane][query]
  int8_t* factors;  // [plane][query][row]
  static int row_bytes(const Group& f) {
    int columns = 0;
    for (int p = 0; p < f.key_planes; p++) columns = std::max(columns, f.k[p].columns);
    return columns / 4 * FOUR;
  }
  static int64_t bytes(int n, const Group& f) { return (int64_t(f.key_planes) * n * (row_bytes(f) + sizeof(float)) + 63) / 64 * 64; }
  Query(int n, const Group& f, char* memory) : n(n), row(row_bytes(f)), scale((float*)memory), factors((int8_t*)(scale + int64_t(f.key_planes) * n)) {}
  int8_t* of(int p, int q) const { return factors + (int64_t(p) * n + q) * row; }
};

inline const float* of_head(const PerHead& x, int b, int h) { return x.data ? x.data + b * x.batch_stride + h * x.head_stride : nullptr; }

// to [columns] = x [rows] times a matrix [rows, columns].
void times(const float* x, const float* matrix, int rows, int columns, float* __restrict to) {
  std::fill(to, to + columns, 0.0f);
  int d = 0;
  for (; d + 4 <= rows; d += 4) {
    const float *m = matrix + int64_t(d) * columns, *m1 = m + columns, *m2 = m1 + columns, *m3 = m2 + columns;
    for (int c = 0; c < columns; c++) to[c] += x[d] * m[c] + x[d + 1] * m1[c] + x[d + 2] * m2[c] + x[d + 3] * m3[c];
  }
  for (; d < rows; d++)
    for (int c = 0; c < columns; c++) to[c] += x[d] * matrix[int64_t(d) * columns + c];
}

// Queries [queries, key_dim] of one KV head times its map: M coordinates and three numbers.
void map_queries(const Args& a, const float* q, const float* map, float* to) {
  const int columns = a.coordinates + 3;
  for (int i = 0; i < a.queries; i++, q += a.key_dim, to += columns) {
    times(q, map, a.key_dim, columns, to);
  }
}

// The next query's lies `stride` numbers further on.
void prepare(const Args& a, const Group& f, const float* mapped, int stride, const Query& query) {
  alignas(64) float columns[MOST_COLUMNS];
  for (int q = 0; q < query.n; q++, mapped += stride)
    for (int p = 0; p < f.key_planes; p++) {
      const int n = f.k[p].columns;
      const float* row = mapped;
      if (!f.same_query) {
        for (int c = 0; c < n; c++) columns[c] = f.q_column[p][c] < a.coordinates ? mapped[f.q_column[p][c]] * f.q_factor[p][c] : 0.0f;
        row = columns;
      }
      query.scale[p * query.n + q] = LOG2E * f.q_weight[p] * split_query(row, n, query.of(p, q));
    }
}

// V vectors of x [NQ][LARGEST_DIM] times a matrix whose rows lie `stride` numbers apart; to alike.
template <int NQ, int V>
inline void times_vectors(const float (*x)[LARGEST_DIM], const float* matrix, int rows, int stride, float* to) {
  vf sum[NQ][V] = {};
  for (int d = 0; d < rows; d++, matrix += stride)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) {
      const vf m = load<vf>(matrix + v * TILE);
#pragma GCC unroll 4
      for (int q = 0; q < NQ; q++) sum[q][v] += x[q][d] * m;
    }
  for (int q = 0; q < NQ; q++)
    for (int v = 0; v < V; v++) store(to + int64_t(q) * stride + v * TILE, sum[q][v]);
}

template <int NQ>
void times_rows(const float (*x)[LARGEST_DIM], const float* matrix, int rows, int stride, float* to) {
  int left = stride / TILE;
  for (; left >= 5; left -= 5, matrix += 5 * TILE, to += 5 * TILE) times_vectors<NQ, 5>(x, matrix, rows, stride, to);
  if (left == 4) times_vectors<NQ, 4>(x, matrix, rows, stride, to);
  if (left == 3) times_vectors<NQ, 3>(x, matrix, rows, stride, to);
  if (left == 2) times_vectors<NQ, 2>(x, matrix, rows, stride, to);
  if (left == 1) times_vectors<NQ, 1>(x, matrix, rows, stride, to);
}

// The body tokens of a chunk that a query may see.
struct Range { int low, high; };

Range seen(const Args& a, const Sequence& of, int b, int q, int t0, int t1) {
  const Positions x = visible(a, b, q % a.new_tokens);
  const int64_t last = std::min<int64_t>(t1, x.codes - a.body), first = std::max<int64_t>(t0, of.first);
  const int low = int(std::clamp<int64_t>(x.low - a.body, first, std::max(first, last))), high = int(std::clamp<int64_t>(x.high - a.body, first, std::max(first, last)));
  return {low - t0, std::max(low, high) - t0};
}

// What one unit of work is about: tokens t0:t1 of a KV head, the h-th of its group; queries and what the map made of them,
// of the first segment, and how far it is to those of the next.
struct Work {
  const Args& a;
  const Group& f;
  const Sequence& of;
  int b, h, t0, t1;
  const float* mapped;
  int64_t mapped_segment;
  char* memory;
  int64_t memory_segment;
  float* part;  // [queries] maxima, [queries] sums, then accumulators
  const float *queries, *partners;  // [queries, key_dim], and what turns with each coordinate
  float* framed;                    // of this thread: mapped queries of a frame
  char* framed_memory;              // and these as integers
  uint8_t* as_values;                  // of this thread: codes of shared rows as planes of values
};

typedef uint8_t vc __attribute__((vector_size(16)));

// Tokens and coordinates of a block of four by four change places.
inline vc transposed(vc x) {
#if defined(__clang__)
  return __builtin_shufflevector(x, x, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
#else
  return __builtin_shuffle(x, vc{0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15});
#endif
}

// Codes of W bits of n tokens, from the granules of a plane of keys from `first` on, as a plane of values: of the blocks of four
// by four that share bytes, those beside each other along the coordinates come to lie beside each other along the tokens.
template <int W>
void to_values(const Plane& keys, const Pages& pages, int h, int first, int dim, int n, uint8_t* to) {
  constexpr int R = 8 / W, GRANULE = 4 * R;
  for (int t = 0; t < n; t += GRANULE, to += dim * 4) {
    const uint8_t* from[R];
    for (int i = 0; i < R; i++) from[i] = keys_at(keys, pages, h, (t + 4 * i) / TILE * TILE) + first * 64 + (t + 4 * i) % TILE * 4;
    for (int c = 0; c < dim; c += GRANULE) {
      vc x[R];
      for (int i = 0; i < R; i++) x[i] = load<vc>(from[i] + c / GRANULE * 64);
      for (int j = 0; j < R && c + 4 * j < dim; j++) {
        vc y{};
        for (int i = 0; i < R; i++) y |= ((x[i] >> (W * j)) & uint8_t((1 << W) - 1)) << (W * i);
        y = transposed(y);
        std::memcpy(to + (c + 4 * j) * 4, &y, sizeof y);
      }
    }
  }
}

// Where the codes of plane p of the values lie in `as_values`.
inline int64_t values_at(const Args& a, const Group& f, int p) { return p ? int64_t(CHUNK) * a.value_dim * f.v[0].width / 8 : 0; }

// The codes of a chunk's shared rows as values.
void to_values(const Work& w, const Pages& pages) {
  const Group& f = w.f;
  const int dim = w.a.value_dim, n = w.t1 - w.t0;
  for (int p = 0; p < f.value_planes; p++) {
    const bool second = p >= f.key_planes;  // 8 bits: both pieces of a code are in one plane
    const Plane& k = f.k[second ? 0 : p];
    const int first = second ? dim * k.width / 32 : 0;
    uint8_t* to = w.as_values + values_at(w.a, f, p);
    k.width == 4 ? to_values<4>(k, pages, w.h, first, dim, n, to) : k.width == 2 ? to_values<2>(k, pages, w.h, first, dim, n, to) : to_values<1>(k, pages, w.h, first, dim, n, to);
  }
}

constexpr struct Steps {
  int64_t at[MOST_COLUMNS / 8];
  constexpr Steps() : at() { for (int i = 0; i < MOST_COLUMNS / 8; i++) at[i] = 64 * i; }
} NEIGHBOURS;  // granules one after the other

// Scores of tokens t0:t1 of the chunk, which are of one segment, in units of log 2; their maxima are at least `most`.
template <class I, int NQ>
void scores(const Work& w, const Pages& pages, const Query& query, const float* mapped, int stride, int q0, int t0, int t1, Ahead& values, float (*s)[CHUNK], float* most) {
  const Args& a = w.a;
  const Group& f = w.f;
  alignas(64) float sigma[CHUNK], offset[CHUNK];
  alignas(64) int32_t sums[NQ][CHUNK];
  scales(f.k_scale, pages, w.h, t0, t1 - t0, 0, sigma);
  scales(f.k_zero, pages, w.h, t0, t1 - t0, 0, offset);
  // 3 bits of all coordinates: one code from both planes, for half the products.
  const bool joined = f.key_planes == 2 && f.same_query && f.k[0].width == 2;
  const Plane& high = f.k[1];
  Ahead none;
  for (int p = 0; p < f.key_planes; p += joined ? 2 : 1) {
    const Plane& k = f.k[p];
    const int n = k.columns * k.width / 32;
    for (int t = t0; t < t1; t += LANES) {
      const int beside = t + TILE < t1 ? t + TILE : t;  // else both halves are the same tile
      const uint8_t *at = keys_at(k, pages, w.h, t), *above = joined ? keys_at(high, pages, w.h, t) : nullptr;
      const Granules from{at, NEIGHBOURS.at, keys_at(k, pages, w.h, beside) - at, above, NEIGHBOURS.at, joined ? keys_at(high, pages, w.h, beside) - above : 0};
      tile<I, NQ>(k.width, joined ? high.width : 0, from, n, query.of(p, q0), query.row, p ? none : values, (int32_t(*)[CHUNK])(sums[0] + (t - t0)));
    }
    const bool last = p + (joined ? 2 : 1) >= f.key_planes;
    for (int q = 0; q < NQ; q++) {
      const float* scalars = mapped + int64_t(q0 + q) * stride + a.coordinates;
      const float scale = query.scale[p * query.n + q0 + q], bias = LOG2E * scalars[0], zero_query = LOG2E * scalars[1], mean = LOG2E * scalars[2];
      vf top = vf{} + NEG;
      float* row = s[q] + t0;
      for (int t = 0; t < t1 - t0; t += TILE) {
        vf x = scale * to_float(load<vi>(sums[q] + t)) + (p ? load<vf>(row + t) : vf{} + bias);
        if (last) x = load<vf>(sigma + t) * x + mean;
        if (last && f.k_zero.data) x += load<vf>(offset + t) * zero_query;
        store(row + t, x);
        top = max(x, top);
      }
      if (last) most[q] = std::max(most[q], a.softcap != 0 ? cap(row, t1 - t0, LOG2E * a.softcap) : most_of(top));
    }
  }
}

// What the values of a chunk add to the output, [NQ][value_dim], for scores and their maxima; the sums of the weights.
// Queries see tokens of `any` only.
template <class I, int NQ>
void readout(const Work& w, const Pages& pages, int q0, Range any, float (*s)[CHUNK], const float* most, float* sum, float* acc) {
  const Args& a = w.a;
  const Group& f = w.f;
  const int group = a.value_dim / f.groups, top = (1 << f.value_bits) - 1, n = w.t1 - w.t0;
  const bool joined = f.value_bits == 3;
  constexpr int WEIGHTS = CHUNK / 4 * FOUR;
  alignas(64) int8_t factors[NQ * WEIGHTS];
  alignas(64) float sigma[CHUNK], offset[CHUNK];
  int64_t steps[2][CHUNK / LEAST_GRANULE];
  const uint8_t* first[2] = {};
  for (int p = 0; p < f.value_planes; p++) {
    if (!f.shared) {
      value_steps(f.v[p], pages, n, steps[p]), first[p] = of_page(f.v[p], pages.at[0], w.h);
      continue;
    }
    first[p] = w.as_values + values_at(a, f, p);
    for (int i = 0; i < n * f.v[p].width / 32; i++) steps[p][i] = int64_t(i) * a.value_dim * 4;
  }
  std::fill(acc, acc + NQ * a.value_dim, 0.0f);
  Ahead keys, none;  // of the next chunk
  const int more = q0 ? 0 : std::min(w.of.to - w.t1, CHUNK);
  const Pages next(a, f.dense, w.b, w.t1, w.t1 + more);
  for (int i = 0; i < std::min(f.key_planes, 2) && more; i++)
    keys.add(f.k[i], next, w.h, more, n * f.v[0].width / (joined ? 64 : 32) * ((group + LANES - 1) / LANES));
  prefetch(f.k_scale, next, w.h, more);
  prefetch(f.k_zero, next, w.h, more);
  for (int g = 0; g < f.groups; g++) {
    scales(f.v_scale, pages, w.h, 0, n, g, sigma);
    scales(f.v_zero, pages, w.h, 0, n, g, offset);
    for (float* x : {sigma, offset}) {  // a hidden token has weight 0, and its scale may be anything
      std::fill(x, x + any.low, 0.0f);
      std::fill(x + any.high, x + n, 0.0f);
    }
    float unit[NQ], constant[NQ];
    for (int q = 0; q < NQ; q++) {
      const float* offsets = f.v_zero.data ? offset : nullptr;
      constant[q] = (g ? split_weights<false> : split_weights<true>)(s[q], most[q], sigma, offsets, n, top, sum[q], unit[q], factors + q * WEIGHTS);
    }
    const int from = g * group, to = from + group;
    for (int d = from / TILE * TILE; d < to; d += LANES)
      for (int p = 0; p < f.value_planes; p += joined ? 2 : 1) {
        const int width = f.v[p].width;
        const int beside = d + TILE < to ? 64 : 0;  // 0: both halves are the same tile
        const Granules granules{first[p] + d * 4, steps[p], beside, joined ? first[1] + d * 4 : nullptr, steps[1], beside};
        alignas(64) int32_t sums[NQ][CHUNK];
        tile<I, NQ>(width, joined ? f.v[1].width : 0, granules, n * width / 32, factors, WEIGHTS, p || g ? none : keys, sums);
        for (int q = 0; q < NQ; q++)
          for (int c = d; c < std::min(d + LANES, to); c += TILE) {
            float* at = acc + q * a.value_dim + c;
            const vf x = unit[q] * float(p ? 1 << f.v[0].width : 1) * to_float(load<vi>(sums[q] + (c - d))) + (p ? 0.0f : constant[q]);
            if (from <= c && c + TILE <= to) {
              store(at, load<vf>(at) + x);
            } else {  // groups that cut a tile
              for (int j = std::max(from - c, 0); j < std::min(to - c, TILE); j++) at[j] += x[j];
            }
          }
      }
  }
}

// Which mapped query reads the page of token t of a chunk.
inline int segment_of(const Args& a, const Pages& pages, int t) {
  if (a.segments == 1) return 0;
  const int32_t segment = a.segment[pages.at[t >> pages.shift]];
  return segment >= 0 && segment < a.segments ? segment : 0;
}

// The segment of a body token, and the first token of the next.
inline int frame_of(const Args& a, int64_t j) { return int(std::min<int64_t>(j / a.frame_tokens, a.frames - 1)); }
inline int64_t frame_end(const Args& a, int frame) { return frame == a.frames - 1 ? std::numeric_limits<int32_t>::max() : int64_t(frame + 1) * a.frame_tokens; }

// NQ queries taken into a frame, mapped, and as integers.
template <int NQ>
void into_frame(const Work& w, int segment, int frame, int q0, const Query& query) {
  const Args& a = w.a;
  const float *c = a.frame + int64_t(frame) * 2 * a.key_dim, *d = c + a.key_dim;
  alignas(64) float x[NQ][LARGEST_DIM];
  for (int q = 0; q < NQ; q++) {
    const float *own = w.queries + int64_t(q0 + q) * a.key_dim, *other = w.partners + int64_t(q0 + q) * a.key_dim;
    for (int i = 0; i < a.key_dim; i++) x[q][i] = c[i] * own[i] + d[i] * other[i];
  }
  times_rows<NQ>(x, of_head(a.map, w.b, w.f.first + w.h) + segment * a.map_segment, a.key_dim, a.map_row, w.framed);
  prepare(a, w.f, w.framed, a.map_row, query);
}

// NQ queries over a chunk.
template <class I, int NQ>
void attend_chunk(const Work& w, const Pages& pages, int q0) {
  const Args& a = w.a;
  const Group& f = w.f;
  alignas(64) float s[NQ][CHUNK];
  const int n = w.t1 - w.t0;
  float* most = w.part + q0;
  std::fill(most, most + NQ, NEG);
  Ahead values;  // of the same tokens
  if (!q0) {
    prefetch(f.v_scale, pages, w.h, n);
    prefetch(f.v_zero, pages, w.h, n);
    const bool joined = f.key_planes == 2 && f.same_query && f.k[0].width == 2;
    const int steps = (n + LANES - 1) / LANES * (f.k[0].columns * f.k[0].width / (joined ? 64 : 32));
    for (int i = 0; i < f.value_planes && !f.shared; i++) values.add(f.v[i], pages, w.h, n, steps);
    for (int p = 0; p < f.key_planes && w.t0 == w.of.from; p++)
      for (int t = 0; t < n; t += TILE) prefetch(keys_at(f.k[p], pages, w.h, t), TILE * f.k[p].columns * f.k[p].width / 8);
  }
  const Query framed(NQ, f, w.framed_memory);
  bool bad[NQ] = {};
  for (int t = 0, stop; t < n; t = stop) {
    const int segment = segment_of(a, pages, t), frame = a.frame ? frame_of(a, w.t0 + t) : 0;
    const int end = a.frame ? int(std::min<int64_t>(frame_end(a, frame) - w.t0, n)) : n;
    for (stop = a.segments > 1 ? t + pages.tokens : end; stop < end && segment_of(a, pages, stop) == segment;) stop += pages.tokens;
    stop = std::min(stop, end);
    if (!a.frame) {
      scores<I, NQ>(w, pages, Query(a.queries, f, w.memory + segment * w.memory_segment), w.mapped + segment * w.mapped_segment, a.coordinates + 3, q0, t, stop, values, s, most);
      continue;
    }
    into_frame<NQ>(w, segment, frame, q0, framed);
    for (int i = 0; i < f.key_planes * NQ; i++) bad[i % NQ] = bad[i % NQ] || std::isnan(framed.scale[i]);
    scores<I, NQ>(w, pages, framed, w.framed, a.map_row, 0, t, stop, values, s, most);
  }
  Range any{n, 0};
  for (int q = 0; q < NQ; q++) {
    const Range range = seen(a, w.of, w.b, q0 + q, w.t0, w.t1);
    if (range.low < range.high) any = {std::min(any.low, range.low), std::max(any.high, range.high)};
    if (range.low > 0 || range.high < n) {
      std::fill(s[q], s[q] + range.low, NEG);
      std::fill(s[q] + range.high, s[q] + n, NEG);
      most[q] = largest(s[q], n);
    }
  }
  if (any.low >= any.high) any = {0, 0};
  if (f.shared && !q0) to_values(w, pages);
  readout<I, NQ>(w, pages, q0, any, s, most, most + a.queries, w.part + 2 * a.queries + int64_t(q0) * a.value_dim);
  for (int q = 0; q < NQ; q++) {  // NaN wherever such a query sees one of these tokens
    const Range range = bad[q] ? seen(a, w.of, w.b, q0 + q, w.t0, w.t1) : Range{0, 0};
    if (range.low < range.high) most[q] = 0, most[a.queries + q] = std::numeric_limits<float>::quiet_NaN();
  }
}

// As many queries at a time as the path has registers for.
template <class I, int NQ = I::QUERIES>
void attend_queries(const Work& w, const Pages& pages, int q0) {
  for (; w.a.queries - q0 >= NQ; q0 += NQ) attend_chunk<I, NQ>(w, pages, q0);
  if constexpr (NQ > 1) attend_queries<I, NQ - 1>(w, pages, q0);
}

void attend_chunk(const Work& w, int isa) {
  const Pages pages(w.a, w.f.dense, w.b, w.t0, w.t1);
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
  if (isa == 2) return attend_queries<Vnni>(w, pages, 0);
#endif
#if defined(__AVX2__)
  if (isa >= 1) return attend_queries<Avx2>(w, pages, 0);
#endif
  attend_queries<Portable>(w, pages, 0);
}

// To the nearest, ties to even; NaN stays one.
inline uint16_t bf16_bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return uint16_t(x != x ? 0x7fc0 : (u + 0x7fff + (u >> 16 & 1)) >> 16);
}

inline uint16_t half_bits(float x) {
#if defined(__F16C__)
  return uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#else
  uint32_t u, sign;
  std::memcpy(&u, &x, 4);
  sign = u >> 16 & 0x8000;
  const float size = std::fabs(x);
  if (x != x) return 0x7e00;
  if (size >= 65520.0f) return uint16_t(sign | 0x7c00);
  if (size < 6.1035156e-5f) return uint16_t(sign | uint32_t(std::nearbyint(size * 16777216.0f)));
  u = (u & 0x7fffffff) - (112u << 23);
  return uint16_t(sign | (u + 0xfff + (u >> 13 & 1)) >> 13);
#endif
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

// Where a token's vector lies, and as fp32.
inline void vector_at(const Dense& x, int64_t b, int h, int64_t token, int n, float* to) {
  const int width = x.dtype == 1 ? 4 : 2;
  widen((const char*)x.data + width * (b * x.batch_stride + h * x.head_stride + token * x.token_stride), x.dtype, n, to);
}

// The queries of one KV head, scaled: [queries, key_dim].
void read_queries(const Args& a, int b, int h, float* to) {
  const int group = a.queries / a.new_tokens;
  for (int i = 0; i < a.queries; i++, to += a.key_dim) {
    vector_at(a.q, b, h * group + i / a.new_tokens, i % a.new_tokens, a.key_dim, to);
    for (int d = 0; d < a.key_dim; d++) to[d] *= a.scaling;
  }
}

// Attention of one KV head's queries over tokens in full precision: out [queries][value_dim] normalized, and lse.
void attend_exact(const Args& a, const Sequence& of, int b, int h, const float* q, float* s /* [queries][rows] */, float* out, float* lse) {
  const int d = a.value_dim;
  const int64_t n = of.rows;
  alignas(64) float row[LARGEST_DIM];
  int64_t j = 0;
  for (const Piece& p : of.piece)
    for (int t = 0; t < p.n; t++, j++) {
      vector_at(*p.k, p.at, h, p.slot + t, a.key_dim, row);
      for (int i = 0; i < a.queries; i++) s[i * n + j] = dot(q + int64_t(i) * a.key_dim, row, a.key_dim);
    }
  if (a.softcap != 0) cap(s, a.queries * n, a.softcap);
  std::fill(out, out + int64_t(a.queries) * d, 0.0f);
  for (int i = 0; i < a.queries; i++) {
    const Positions all = visible(a, b, i % a.new_tokens);
    float *w = s + i * n, most = NEG, total = 0;
    bool bad = false;
    j = 0;
    for (const Piece& p : of.piece) {
      const Positions x = in_full(a, all, p.position);
      const int m = p.n;
      const int low = int(std::clamp<int64_t>(x.low - p.position, 0, m)), high = int(std::clamp<int64_t>(x.high - p.position, low, m));
      std::fill(w + j, w + j + low, NEG);
      for (int t = low; t < high; t++) {
        most = std::max(most, w[j + t]);
        bad = bad || std::isnan(w[j + t]);
      }
      std::fill(w + j + high, w + j + m, NEG);
      j += m;
    }
    for (j = 0; j < n; j++) total += w[j] = most == NEG || w[j] == NEG ? 0.0f : std::exp(w[j] - most);
    lse[i] = bad ? std::numeric_limits<float>::quiet_NaN() : most == NEG ? NEG : most + std::log(total);
    for (j = 0; j < n && total > 0; j++) w[j] /= total;
  }
  j = 0;
  for (const Piece& p : of.piece)
    for (int t = 0; t < p.n; t++, j++) {
      vector_at(*p.v, p.at, h, p.slot + t, d, row);
      for (int i = 0; i < a.queries; i++) {
        const float w = s[i * n + j];
        if (w != 0)  // a hidden token may hold anything
          for (int c = 0; c < d; c++) out[int64_t(i) * d + c] += w * row[c];
      }
    }
}

// From the basis of the values to the model's.
void read_back(const Args& a, int b, int h, float* out, float* work) {
  const float *read = of_head(a.read, b, h), *mean = of_head(a.mean, b, h);
  if (read) {
    std::copy(out, out + a.value_dim, work);
    times(work, read, a.value_dim, a.value_dim, out);
  }
  for (int c = 0; c < a.value_dim && mean; c++) out[c] += mean[c];
}

// Join attention over full-precision tokens to that over packed ones, by log-sum-exp.
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

// The output of a query of KV head h.
void write_out(const Args& a, int b, int h, int q, const float* from) {
  const Dense& x = a.out;
  const int64_t head = int64_t(h) * (a.queries / a.new_tokens) + q / a.new_tokens;
  char* to = (char*)x.data + (x.dtype == 1 ? 4 : 2) * (b * x.batch_stride + head * x.head_stride + q % a.new_tokens * x.token_stride);
  if (x.dtype == 1) std::memcpy(to, from, a.value_dim * sizeof(float));
  for (int c = 0; c < a.value_dim && x.dtype != 1; c++) ((uint16_t*)to)[c] = x.dtype == 2 ? bf16_bits(from[c]) : half_bits(from[c]);
}

// Join what the chunks of a query have: its output, normalized, and lse; NaN where `bad`.
void join_chunks(const Args& a, const float* part, int chunks, int q, bool bad, float* out, float& lse) {
  const int64_t width = int64_t(a.queries) * (a.value_dim + 2);
  float most = NEG, total = 0;
  std::fill(out, out + a.value_dim, 0.0f);
  for (int c = 0; c < chunks; c++) most = std::max(most, part[c * width + q]);
  for (int c = 0; c < chunks && most != NEG; c++, part += width) {
    if (part[q] == NEG) continue;
    const float factor = std::exp2(part[q] - most);
    total += factor * part[a.queries + q];
    for (int d = 0; d < a.value_dim; d++) out[d] += factor * part[2 * a.queries + int64_t(q) * a.value_dim + d];
  }
  lse = most == NEG ? NEG : most / LOG2E + std::log(total);
  for (int d = 0; d < a.value_dim && total > 0; d++) out[d] /= total;
  if (!bad && !std::isnan(total)) return;
  lse = std::numeric_limits<float>::quiet_NaN();
  std::fill(out, out + a.value_dim, lse);
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

extern "C" int headq_group_size() { return int(sizeof(Group)); }

// Sequences of equally many new tokens. Returns 1 where there is no memory.
static int attend(const Args& a, int isa) {
  const int heads = a.batch * a.kv_heads, columns = a.coordinates + 3;
  const std::unique_ptr<Sequence[]> sequences(new (std::nothrow) Sequence[a.batch]);
  if (!sequences) return 1;
  int64_t bytes = 0, chunks = 0, rows = 0;
  int64_t as_values_size = 0;
  for (int g = 0; g < a.n_groups; g++) {
    if (a.groups[g].shared) as_values_size = std::max(as_values_size, int64_t(CHUNK) * a.value_dim * a.groups[g].value_bits / 8);
    bytes = std::max(bytes, Query::bytes(std::max(a.queries, MOST_ROWS), a.groups[g]));
  }
  for (int b = 0; b < a.batch; b++) {
    Sequence& s = sequences[b] = sequence(a, b);
    s.before = chunks;
    chunks += s.chunks;
    rows = std::max<int64_t>(rows, s.rows);
    if (a.reads) count(a, s, b);
  }
  const auto group = [&](int h) -> const Group& {
    int g = 0;
    while (h >= a.groups[g].first + a.groups[g].heads) g++;
    return a.groups[g];
  };
  const int64_t width = int64_t(a.queries) * (a.value_dim + 2), q_size = int64_t(a.queries) * a.key_dim, mapped_size = chunks && !a.frame ? int64_t(a.queries) * columns : 0;
  const int64_t exact_size = int64_t(a.queries) * (a.value_dim + 1 + rows), parts_size = width * chunks * a.kv_heads;
  const int64_t mapped_all = a.mapped ? 0 : heads * a.segments * mapped_size;
  const int64_t partners_size = a.frame ? heads * q_size : 0, framed_size = a.frame ? int64_t(MOST_ROWS) * a.map_row : 0;
  const std::unique_ptr<float[]> floats(new (std::nothrow) float[parts_size + heads * q_size + mapped_all + a.threads * (exact_size + framed_size) + partners_size]);
  const std::unique_ptr<char[]> memory(new (std::nothrow) char[!chunks ? 1 : bytes * (a.frame ? a.threads : heads * a.segments)]);
  const std::unique_ptr<uint8_t[]> as_values(new (std::nothrow) uint8_t[chunks && as_values_size ? a.threads * as_values_size : 1]);
  if (!floats || !memory || !as_values) return 1;
  float *parts = floats.get(), *queries = parts + parts_size, *own = queries + heads * q_size, *exacts = own + mapped_all;
  float *partners = exacts + a.threads * exact_size, *framed = partners + partners_size;
  const float* mapped = a.mapped ? a.mapped : own;
#pragma omp parallel num_threads(a.threads)
  {
#pragma omp for schedule(static)
    for (int i = 0; i < heads; i++) {
      const int b = i / a.kv_heads, h = i % a.kv_heads;
      read_queries(a, b, h, queries + i * q_size);
      for (int64_t at = 0; at < (a.frame ? q_size : 0); at += a.key_dim)
        for (int d = 0; d < a.key_dim; d++) partners[i * q_size + at + d] = queries[i * q_size + at + a.partner[d]];
      for (int g = 0; g < a.segments && sequences[b].chunks && !a.frame; g++) {
        const int64_t at = (int64_t(g) * heads + i) * mapped_size;
        if (!a.mapped) map_queries(a, queries + i * q_size, of_head(a.map, b, h) + g * a.map_segment, own + at);
        const Group& f = group(h);
        prepare(a, f, mapped + at, columns, Query(a.queries, f, memory.get() + (int64_t(g) * heads + i) * bytes));
      }
    }
// neighbouring chunks go to one thread, which has asked for what follows
#pragma omp for schedule(guided)
    for (int64_t k = 0; k < chunks * a.kv_heads; k++) {
      int b = 0;
      while (b + 1 < a.batch && k >= sequences[b + 1].before * a.kv_heads) b++;
      const Sequence& s = sequences[b];
      const int h = int((k - s.before * a.kv_heads) / s.chunks), c = int((k - s.before * a.kv_heads) % s.chunks);
      const int64_t i = int64_t(b) * a.kv_heads + h;
      const int t0 = s.from + c * CHUNK;
      const Group& f = group(h);
      attend_chunk({a, f, s, b, h - f.first, t0, std::min(t0 + CHUNK, s.to), mapped + i * mapped_size, heads * mapped_size, memory.get() + i * bytes, heads * bytes, parts + width * k,
                    queries + i * q_size, partners + i * q_size, framed + omp_get_thread_num() * framed_size, memory.get() + omp_get_thread_num() * bytes,
                    as_values.get() + omp_get_thread_num() * as_values_size}, isa);
    }
#pragma omp for schedule(static)
    for (int i = 0; i < heads; i++) {
      const int b = i / a.kv_heads, h = i % a.kv_heads;
      const Sequence& s = sequences[b];
      const Group& f = group(h);
      float *exact = exacts + omp_get_thread_num() * exact_size, *exact_lse = exact + int64_t(a.queries) * a.value_dim, *weights = exact_lse + a.queries;
      attend_exact(a, s, b, h, queries + i * q_size, weights, exact, exact_lse);
      for (int q = 0; q < a.queries; q++) {
        const Range range = seen(a, s, b, q, s.from, s.to);
        bool bad = false;
        for (int g = 0; g < a.segments && range.low < range.high && !a.frame; g++)
          for (int p = 0; p < f.key_planes; p++) bad = bad || std::isnan(Query(a.queries, f, memory.get() + (int64_t(g) * heads + i) * bytes).scale[p * a.queries + q]);
        alignas(64) float out[LARGEST_DIM];
        float lse;
        join_chunks(a, parts + width * (s.before * a.kv_heads + int64_t(h) * s.chunks), s.chunks, q, bad, out, lse);
        alignas(64) float work[LARGEST_DIM];
        if (lse != NEG) read_back(a, b, h, out, work);
        join(out, lse, exact + int64_t(q) * a.value_dim, exact_lse[q], a.value_dim);
        write_out(a, b, h, q, out);
        if (a.lse) a.lse[int64_t(i) * a.queries + q] = lse;
      }
    }
  }
  return 0;
}

// Returns 1 where there is no memory, 2 where HEADQ_CPU_ISA names no path.
extern "C" int headq_paged_attention(const Args* args) {
  const int isa = headq_isa();
  if (isa < 0) return 2;
  if (!args->query_start) return attend(*args, isa);
  const int64_t* start = args->query_start;
  const int group = args->queries / args->new_tokens;
  for (int b = 0, n; b < args->batch; b += n) {  // neighbours of equally many new tokens at once
    const int64_t tokens = start[b + 1] - start[b];
    for (n = 1; b + n < args->batch && start[b + n + 1] - start[b + n] == tokens;) n++;
    if (tokens <= 0) continue;
    Args a = *args;
    a.query_start = nullptr;
    a.batch = n, a.new_tokens = int32_t(tokens), a.queries = int32_t(group * tokens);
    for (Dense* x : {&a.q, &a.out}) {
      x->data = (const char*)x->data + (x->dtype == 1 ? 4 : 2) * start[b] * x->token_stride;
      x->batch_stride = tokens * x->token_stride;
    }
    a.table += b * a.table_row;
    if (a.window_table) a.window_table += b * a.window_row;
    for (const int64_t** x : {&a.packed, &a.held, &a.total, &a.new_start})
      if (*x) *x += b;
    if (const int failed = attend(a, isa)) return failed;
  }
  return 0;
}
