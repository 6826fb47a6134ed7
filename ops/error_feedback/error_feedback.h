// Rounding with error feedback on the CPU: see reference.py. The lanes of a vector hold tokens, so that the recursion
// over coordinates costs one multiply-add per pair of coordinates for all of them; or, of few tokens, the scales that
// are tried for each. Either way a lane does the same arithmetic in the same order: codes are equal, bit for bit.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace headq {

typedef float V16 __attribute__((vector_size(64)));
typedef float V8 __attribute__((vector_size(32)));

constexpr int TILE = 16;   // tokens that go side by side
constexpr int BLOCK = 8;   // coordinates whose products with an error share its load
constexpr int TRIES = 8;   // scales that are tried
constexpr int KEPT = 2;    // of them that are improved by coordinate descent
constexpr int PASSES = 2;  // of it
constexpr float SPREADS[TRIES] = {0.7f, 0.78f, 0.86f, 0.94f, 1.02f, 1.1f, 1.18f, 1.26f};  // in units of the token's RMS

template <class V>
constexpr int lanes = int(sizeof(V) / sizeof(float));

template <class V>
inline V all(float x) { return V{} + x; }
// Nearest, ties to even, as torch.round; for |x| < 2^22, and larger values are clamped by the caller.
template <class V>
inline V nearest(V x) { return (x + 12582912.0f) - 12582912.0f; }

inline float to_half(float x) {
#if defined(__F16C__)
  return _cvtsh_ss(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#else
  int exponent;
  std::frexp(x, &exponent);
  float unit = std::ldexp(1.0f, std::max(exponent - 11, -24));  // of the last kept bit
  return std::nearbyint(x / unit) * unit;
#endif
}

// To the fp16 that is stored, never to zero.
template <class V>
inline V half(V x) {
  x = x > 5.9604645e-8f ? x : all<V>(5.9604645e-8f);
  x = x < 65504.0f ? x : all<V>(65504.0f);
  alignas(64) float f[lanes<V>];
  std::memcpy(f, &x, sizeof f);
#if defined(__F16C__)
  for (int i = 0; i < lanes<V>; i += 8)
    _mm256_store_ps(f + i, _mm256_cvtph_ps(_mm256_cvtps_ph(_mm256_load_ps(f + i), _MM_FROUND_TO_NEAREST_INT)));
#else
  for (int i = 0; i < lanes<V>; i++) f[i] = to_half(f[i]);
#endif
  std::memcpy(&x, f, sizeof f);
  return x;
}

// To one of the 256 scales that a byte holds: fp16 with five mantissa bits from 1/16 to 15.75. See rounding.py.
template <class V>
inline V short_scale(V x) {
  x = x > 0.0625f ? x : all<V>(0.0625f);
  x = half(x < 15.75f ? x : all<V>(15.75f));
  typedef uint32_t Bits __attribute__((vector_size(sizeof(V))));
  const Bits near = ((Bits)x + (1u << 17)) & ~((1u << 18) - 1);
  return (V)near;
}
template <class V>
inline V stored_scale(V x, bool in_a_byte) { return in_a_byte ? short_scale(x) : half(x); }

constexpr uint32_t LEAST_SHORT = 0x3d800000u;  // bits of 1/16, the scale of byte 0
inline uint8_t byte_of_scale(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return uint8_t((u - LEAST_SHORT) >> 18);
}

// How the tokens of one head are rounded.
struct Quadratic {
  const float *hessian, *factor;  // [n, n]; of ldl_factor
  const float* step;                // [n]
  int n;
  float top;
  bool unbiased, byte_scale;
};

// sum[c] = Σ_j x[j] m[j][c], j < count, for the first columns c of a matrix.
template <int C, class V>
inline void products(const float* m, int64_t stride, const V* x, int count, V* sum) {
  V s[C] = {};
  for (int j = 0; j < count; j++, m += stride)
    for (int c = 0; c < C; c++) s[c] += m[c] * x[j];
  for (int c = 0; c < C; c++) sum[c] = s[c];
}
template <class V>
inline void products(int columns, const float* m, int64_t stride, const V* x, int count, V* sum) {
  if (columns == BLOCK) return products<BLOCK>(m, stride, x, count, sum);
  for (int c = 0; c < columns; c++) products<1>(m + c, stride, x, count, sum + c);
}

// The columns from c on, WIDTH vectors of them, of y = x M for T tokens.
template <int T, int WIDTH>
inline void transform_columns(const float* x, const float* m, int rows, int columns, int c, float* y) {
  V16 s[T][WIDTH] = {};
  for (int k = 0; k < rows; k++)
    for (int i = 0; i < WIDTH; i++) {
      V16 v;
      std::memcpy(&v, m + int64_t(k) * columns + c + i * TILE, sizeof v);
      for (int t = 0; t < T; t++) s[t][i] += x[int64_t(t) * rows + k] * v;
    }
  for (int t = 0; t < T; t++)
    for (int i = 0; i < WIDTH; i++) std::memcpy(y + int64_t(t) * columns + c + i * TILE, &s[t][i], sizeof(V16));
}

template <int T>
inline void transform_tokens(const float* x, const float* m, int rows, int columns, float* y) {
  int c = 0;
  for (; c + 4 * TILE <= columns; c += 4 * TILE) transform_columns<T, 4>(x, m, rows, columns, c, y);
  for (; c + TILE <= columns; c += TILE) transform_columns<T, 1>(x, m, rows, columns, c, y);
  for (; c < columns; c++)
    for (int t = 0; t < T; t++) {
      float s = 0;
      for (int k = 0; k < rows; k++) s += x[int64_t(t) * rows + k] * m[int64_t(k) * columns + c];
      y[int64_t(t) * columns + c] = s;
    }
}

// y = x M of tokens, x [tokens, rows], M [rows, columns]; each sum runs over the rows in order.
inline void transform(const float* x, const float* m, int tokens, int rows, int columns, float* y) {
  for (; tokens >= 4; tokens -= 4, x += int64_t(4) * rows, y += int64_t(4) * columns) transform_tokens<4>(x, m, rows, columns, y);
  for (; tokens > 0; tokens--, x += rows, y += columns) transform_tokens<1>(x, m, rows, columns, y);
}

// x' M y of each lane.
template <class V>
inline V quadratic_form(const float* m, int n, const V* x, const V* y, V* product = nullptr) {
  V total{}, part[BLOCK];
  for (int i = 0; i < n; i += BLOCK) {
    const int here = std::min(BLOCK, n - i);
    products(here, m + i, n, x, n, part);
    for (int c = 0; c < here; c++) total += part[c] * y[i + c];
    if (product) std::copy(part, part + here, product + i);
  }
  return total;
}

template <class V>
struct Work {
  std::vector<V> y, seen, code, errors;  // seen: M y; errors: at each scale that is tried
  V* e = nullptr;                        // those at work, in one of them: y - y_hat
  V error;                               // of the last sweep but those of descent: e' M e
  explicit Work(int n) : y(n), seen(n), code(n), errors(int64_t(n) * TRIES) {}
};

// Sequential rounding, in which the errors so far correct the next coordinate, a pass of coordinate descent, in which all
// errors do, or what the errors cost as they are. With H = N D N': e' H e = sum of D_i (e_i + sum over j < i of N_ji e_j)^2.
enum Sweep { ELIMINATE, DESCEND, MEASURE };

// One coordinate: its code, and the error that it leaves, which corrects the rest of its block.
template <class V, Sweep SWEEP>
inline void round_coordinate(const Quadratic& q, const float* m, Work<V>& w, V sigma, V* part, int first, int r, int here) {
  const int i = first + r;
  const float diagonal = m[int64_t(i) * q.n + r];
  const V before = w.e[i];
  V change = before;
  if (SWEEP != MEASURE) {
    const V width = sigma * q.step[i], pull = SWEEP == DESCEND ? part[r] / diagonal - before : part[r];
    V c = nearest((w.y[i] + pull) / width + q.top / 2);
    c = c > 0.0f ? c : V{};
    c = c < q.top ? c : all<V>(q.top);
    if (SWEEP == DESCEND) w.code[i] = c;
    change = w.e[i] = w.y[i] - width * (c - q.top / 2);
  }
  if (SWEEP == DESCEND) {
    change -= before;
  } else {
    const V all_of_it = change + part[r];
    w.error += diagonal * (all_of_it * all_of_it);
  }
  for (int later = r + 1; later < here; later++) part[later] += m[int64_t(i) * q.n + later] * change;
}

// Sums over whole blocks first, and what changes within the block one coordinate at a time. K heads go side by side: a
// coordinate waits for the one before it, and meanwhile the other head's is computed.
template <class V, int K, Sweep SWEEP>
inline void sweep(const Quadratic* q, Work<V>* const* w, const V* sigma) {
  const int n = q[0].n;
  V part[K][BLOCK];
  const float* m[K];
  for (int k = 0; k < K && SWEEP != DESCEND; k++) w[k]->error = V{};
  for (int first = 0; first < n; first += BLOCK) {
    const int here = std::min(BLOCK, n - first);
    for (int k = 0; k < K; k++) {
      m[k] = (SWEEP == DESCEND ? q[k].hessian : q[k].factor) + first;
      products(here, m[k], n, w[k]->e, SWEEP == DESCEND ? n : first, part[k]);
    }
    if (here == BLOCK) {
#pragma GCC unroll 8
      for (int r = 0; r < BLOCK; r++)
        for (int k = 0; k < K; k++) round_coordinate<V, SWEEP>(q[k], m[k], *w[k], sigma[k], part[k], first, r, BLOCK);
    } else {
      for (int r = 0; r < here; r++)
        for (int k = 0; k < K; k++) round_coordinate<V, SWEEP>(q[k], m[k], *w[k], sigma[k], part[k], first, r, here);
    }
  }
}

// Codes at the scales sigma, from the errors of sequential rounding; what they leave is measured.
template <class V, int K>
inline void descend(const Quadratic* q, Work<V>* const* w, const V* sigma) {
  for (int pass = 0; pass < PASSES; pass++) sweep<V, K, DESCEND>(q, w, sigma);
  sweep<V, K, MEASURE>(q, w, sigma);
}

// The scale that is stored, and the error that is left.
template <class V>
inline V remaining_error(const Quadratic& q, const Work<V>& w, V energy, V& sigma) {
  V error = w.error;
  if (q.unbiased) {  // the gain that makes y' M y_hat = y' M y, and the error e + (1 - gain) y_hat that it leaves
    V cross{};
    for (int i = 0; i < q.n; i++) cross += (w.y[i] - w.e[i]) * w.seen[i];
    V gain = energy / (cross > 1e-30f ? cross : all<V>(1e-30f));
    gain = gain > 0.0f ? gain : all<V>(1.0f);
    if (q.byte_scale) gain = sigma > 0.0625f ? gain : all<V>(1.0f);  // smaller still: its codes have no direction
    V kept = stored_scale(sigma * gain, q.byte_scale);
    V less = 1.0f - kept / sigma, size = error - energy + 2 * cross;
    error += less * (2 * (cross - size) + less * size);
    sigma = kept;
  }
  return error;
}

template <class V>
inline V rms_of(const Quadratic& q, const Work<V>& w) {
  V square{};
  for (int i = 0; i < q.n; i++) square += w.y[i] * w.y[i];
  V rms{};
  for (int l = 0; l < lanes<V>; l++) rms[l] = std::sqrt(square[l] / q.n);
  return rms;
}

// A non-finite token has none.
template <class V>
inline V code_of(V c, float top) {
  c = c >= 0.0f ? c : V{};
  return c <= top ? c : V{};
}

// Up to 16 tokens of one head, one to a lane: y [tokens, n] to codes [tokens, n] and sigma [tokens]. Two scales go side by
// side.
inline void round_tile(const Quadratic& q, Work<V16>* const* w, const float* y, int tokens, uint8_t* codes, float* sigma) {
  static_assert(TRIES % 2 == 0 && KEPT == 2);
  typedef int32_t I16 __attribute__((vector_size(64)));
  typedef uint8_t B16 __attribute__((vector_size(TILE)));
  const int n = q.n;
  const Quadratic same[2] = {q, q};
  V16 energy{}, tried[TRIES], error[2], least[KEPT], kept[KEPT];
  I16 at[KEPT];
  float* in_lanes = (float*)w[0]->y.data();
  std::fill_n(in_lanes, int64_t(n) * TILE, 0.0f);
  for (int l = 0; l < tokens; l++)
    for (int i = 0; i < n; i++) in_lanes[i * TILE + l] = y[int64_t(l) * n + i];
  const V16 rms = rms_of(q, *w[0]);
  if (q.unbiased) energy = quadratic_form(q.hessian, n, w[0]->y.data(), w[0]->y.data(), w[0]->seen.data());
  w[1]->y = w[0]->y, w[1]->seen = w[0]->seen;
  for (int k = 0; k < KEPT; k++) least[k] = all<V16>(std::numeric_limits<float>::infinity()), at[k] = I16{};
  for (int s = 0; s < TRIES; s += 2) {
    for (int k = 0; k < 2; k++) {
      w[k]->e = w[0]->errors.data() + int64_t(s + k) * n;
      tried[s + k] = stored_scale(rms * SPREADS[s + k], q.byte_scale);
    }
    sweep<V16, 2, ELIMINATE>(same, w, tried + s);
    for (int k = 0; k < 2; k++) {
      const V16 x = w[k]->error;
      const auto first = x < least[0], second = x < least[1];
      at[1] = first ? at[0] : second ? at[0] * 0 + (s + k) : at[1];
      least[1] = first ? least[0] : second ? x : least[1];
      at[0] = first ? at[0] * 0 + (s + k) : at[0];
      least[0] = first ? x : least[0];
    }
  }
  for (int k = 0; k < KEPT; k++) {
    w[k]->e = w[1]->errors.data() + int64_t(k) * n;
    std::copy_n(w[0]->errors.data(), n, w[k]->e);
    kept[k] = tried[0];
    for (int s = 1; s < TRIES; s++) {
      const auto here = at[k] == s;
      const V16* from = w[0]->errors.data() + int64_t(s) * n;
      kept[k] = here ? tried[s] : kept[k];
      for (int i = 0; i < n; i++) w[k]->e[i] = here ? from[i] : w[k]->e[i];
    }
  }
  descend<V16, 2>(same, w, kept);
  for (int k = 0; k < 2; k++) error[k] = remaining_error(q, *w[k], energy, kept[k]);
  const auto better = error[1] < error[0];
  const V16 scale = better ? kept[1] : kept[0];
  std::memcpy(sigma, &scale, tokens * sizeof(float));
  uint8_t* bytes = (uint8_t*)w[0]->seen.data();
  for (int i = 0; i < n; i++) {
    const B16 code = __builtin_convertvector(__builtin_convertvector(code_of(better ? w[1]->code[i] : w[0]->code[i], q.top), I16), B16);
    std::memcpy(bytes + i * TILE, &code, TILE);
  }
  for (int l = 0; l < tokens; l++)
    for (int i = 0; i < n; i++) codes[int64_t(l) * n + i] = bytes[i * TILE + l];
}

// Few tokens: what a lane holds is one scale of one token. K heads of the same width go side by side.
template <class V>
constexpr int few = lanes<V> / TRIES;

// Of each token the KEPT scales of the least error, into the first of its lanes (and what its other lanes hold is not
// looked at).
template <class V>
inline void keep_few(Work<V>& w, int n, V& sigma) {
  int from[lanes<V>];
  for (int l = 0; l < lanes<V>; l++) from[l] = l / TRIES * TRIES;
  for (int first = 0; first + TRIES <= lanes<V>; first += TRIES) {
    float least[KEPT];
    std::fill_n(least, KEPT, std::numeric_limits<float>::infinity());
    for (int l = first; l < first + TRIES; l++) {
      float x = w.error[l];
      for (int slot = 0, at = l; slot < KEPT; slot++)
        if (x < least[slot]) std::swap(x, least[slot]), std::swap(at, from[first + slot]);
    }
  }
  const V scale = sigma;
  for (int l = 0; l < lanes<V>; l++) sigma[l] = scale[from[l]];
  for (int i = 0; i < n; i++) {
    alignas(64) float f[lanes<V>], to[lanes<V>];
    std::memcpy(f, &w.e[i], sizeof f);
    for (int l = 0; l < lanes<V>; l++) to[l] = f[from[l]];
    std::memcpy(&w.e[i], to, sizeof to);
  }
}

template <class V, int K>
inline void round_few(
    const Quadratic* q, Work<V>* const* w, const float* const* y, int tokens, uint8_t* const* codes, float* const* sigma) {
  const int n = q[0].n;
  V tried[K], energy[K] = {};
  for (int k = 0; k < K; k++) {
    w[k]->e = w[k]->errors.data();
    V spread = all<V>(1.0f);
    alignas(64) float f[lanes<V>];
    for (int i = 0; i < n; i++) {
      for (int l = 0; l < lanes<V>; l++) f[l] = y[k][int64_t(std::min(l / TRIES, tokens - 1)) * n + i];
      std::memcpy(&w[k]->y[i], f, sizeof f);
    }
    for (int l = 0; l < lanes<V>; l++) spread[l] = SPREADS[l % TRIES];
    tried[k] = stored_scale(rms_of(q[k], *w[k]) * spread, q[k].byte_scale);
    if (!q[k].unbiased) continue;
    float* seen = (float*)w[k]->code.data();  // M y of each token
    transform(y[k], q[k].hessian, tokens, n, n, seen);
    for (int i = 0; i < n; i++) {
      for (int l = 0; l < lanes<V>; l++) f[l] = seen[int64_t(std::min(l / TRIES, tokens - 1)) * n + i];
      std::memcpy(&w[k]->seen[i], f, sizeof f);
      energy[k] += w[k]->seen[i] * w[k]->y[i];
    }
  }
  sweep<V, K, ELIMINATE>(q, w, tried);
  for (int k = 0; k < K; k++) keep_few(*w[k], n, tried[k]);
  descend<V, K>(q, w, tried);
  for (int k = 0; k < K; k++) {
    const V error = remaining_error(q[k], *w[k], energy[k], tried[k]);
    for (int i = 0; i < n; i++) w[k]->code[i] = code_of(w[k]->code[i], q[k].top);
    for (int t = 0; t < tokens; t++) {
      int best = t * TRIES;
      for (int l = best + 1; l < t * TRIES + KEPT; l++) best = error[l] < error[best] ? l : best;
      sigma[k][t] = tried[k][best];
      const float* code = (const float*)w[k]->code.data() + best;
      for (int i = 0; i < n; i++) codes[k][int64_t(t) * n + i] = uint8_t(code[int64_t(i) * lanes<V>]);
    }
  }
}

// The working sets of one thread.
struct Scratch {
  Work<V16> wide[2];
  Work<V8> narrow[2];
  explicit Scratch(int n) : wide{Work<V16>(n), Work<V16>(n)}, narrow{Work<V8>(n), Work<V8>(n)} {}
};

constexpr int TILE_FROM = 7;  // that many tokens take no longer as a whole tile than four at a time

// Any number of tokens of one head.
inline void round_tokens(const Quadratic& q, Scratch& s, const float* y, int tokens, uint8_t* codes, float* sigma) {
  Work<V16>* wide[2] = {&s.wide[0], &s.wide[1]};
  Work<V8>* narrow = s.narrow;
  for (int done = 0; done < tokens;) {
    int here = tokens - done;
    const float* from = y + int64_t(done) * q.n;
    uint8_t* to = codes + int64_t(done) * q.n;
    float* scale = sigma + done;
    if (here >= TILE_FROM) {
      here = std::min(here, TILE);
      round_tile(q, wide, from, here, to, scale);
    } else if (here == 1) {
      round_few<V8, 1>(&q, &narrow, &from, 1, &to, &scale);
    } else if (here <= few<V16>) {
      round_few<V16, 1>(&q, wide, &from, here, &to, &scale);
    } else {  // two of them side by side
      const Quadratic same[2] = {q, q};
      constexpr int half = few<V16>;
      here = std::min(here, 2 * half);
      const float* y2[2] = {from, from + int64_t(here - half) * q.n};
      uint8_t* codes2[2] = {to, to + int64_t(here - half) * q.n};
      float* scale2[2] = {scale, scale + here - half};
      round_few<V16, 2>(same, wide, y2, half, codes2, scale2);
    }
    done += here;
  }
}

}  // namespace headq
