// The kernel of commit 96f785c, kept as it was: codes of calibrated codecs must not change.
// Rounding with error feedback on the CPU: see reference.py. Sixteen rows go side by side, one to a vector lane, so
// that the recursion over coordinates costs one multiply-add per pair of coordinates for all of them.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <vector>
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 16;
constexpr int BLOCK = 8;  // coordinates whose products with an error share its load
typedef float Row __attribute__((vector_size(4 * LANES)));
typedef int32_t Mask __attribute__((vector_size(4 * LANES)));

struct Args {
  int32_t matrices, heads, batch, rows, width, bits, spreads, passes, unbiased, threads;
  const float *y;                  // [batch, heads, rows, width]
  const float *metric, *feedback;  // [matrices, width, width]
  const float *step;               // [matrices, width]
  const int32_t *matrix;           // [batch * heads], which metric each head of each sequence uses
  const float *spread;             // [spreads]
  uint8_t *codes;                  // [batch, heads, rows, width]
  float *scale;                    // [batch, heads, rows], values that fp16 holds
};

inline Row all(float x) { return Row{} + x; }
inline Row select(Mask m, Row a, Row b) { return (Row)((m & (Mask)a) | (~m & (Mask)b)); }
// Nearest, ties to even, as torch.round; for |x| < 2^22, and larger values are clamped by the caller.
inline Row nearest(Row x) { return (x + 12582912.0f) - 12582912.0f; }

// To the fp16 that is stored, never to zero.
inline Row half(Row x) {
  x = select(x > all(5.9604645e-8f), x, all(5.9604645e-8f));
  x = select(x < all(65504.0f), x, all(65504.0f));
#if defined(__F16C__)
  alignas(64) float f[LANES];
  std::memcpy(f, &x, sizeof f);
  for (int i = 0; i < LANES; i++) f[i] = _cvtsh_ss(_cvtss_sh(f[i], _MM_FROUND_TO_NEAREST_INT));
  std::memcpy(&x, f, sizeof f);
#else
  alignas(64) float f[LANES];
  std::memcpy(f, &x, sizeof f);
  for (int i = 0; i < LANES; i++) {
    int exponent;
    std::frexp(f[i], &exponent);
    float unit = std::ldexp(1.0f, std::max(exponent - 11, -24));  // of the last kept bit
    f[i] = std::nearbyint(f[i] / unit) * unit;
  }
  std::memcpy(&x, f, sizeof f);
#endif
  return x;
}

// sum[c] = Σ_j x[j] m[j][c], j < n, for the first columns c of a matrix.
template <int C>
inline void products(const float* m, int64_t stride, const Row* x, int n, Row* sum) {
  Row s[C] = {};
  for (int j = 0; j < n; j++, m += stride)
    for (int c = 0; c < C; c++) s[c] += m[c] * x[j];
  for (int c = 0; c < C; c++) sum[c] = s[c];
}
inline void products(int columns, const float* m, int64_t stride, const Row* x, int n, Row* sum) {
  if (columns == BLOCK) return products<BLOCK>(m, stride, x, n, sum);
  for (int c = 0; c < columns; c++) products<1>(m + c, stride, x, n, sum + c);
}

// x' M y, and x' M where `seen` is given.
inline Row form(const float* m, int n, const Row* x, const Row* y, Row* seen = nullptr) {
  Row total{}, part[BLOCK];
  for (int i = 0; i < n; i += BLOCK) {
    const int here = std::min(BLOCK, n - i);
    products(here, m + i, n, x, n, part);
    for (int c = 0; c < here; c++) total += part[c] * y[i + c];
    if (seen) std::copy(part, part + here, seen + i);
  }
  return total;
}

struct Work {
  std::vector<Row> y, seen, e, code, best;  // seen: M y
  explicit Work(int n) : y(n), seen(n), e(n), code(n), best(n) {}
};

inline Row quantize(Row target, Row width, float top) {
  Row c = nearest(target / width + top / 2);
  c = select(c > all(0.0f), c, all(0.0f));
  return select(c < all(top), c, all(top));
}

void tile(const Args& a, const float* metric, const float* feedback, const float* step, Work& w, uint8_t* codes, float* scale, int rows) {
  const int n = a.width;
  const float top = float((1 << a.bits) - 1);
  Row square{}, best_error = all(std::numeric_limits<float>::infinity()), best_scale{};
  for (int i = 0; i < n; i++) square += w.y[i] * w.y[i];
  Row rms;
  for (int l = 0; l < LANES; l++) rms[l] = std::sqrt(square[l] / n);
  Row energy{}, part[BLOCK];
  if (a.unbiased) energy = form(metric, n, w.y.data(), w.y.data(), w.seen.data());
  for (int s = 0; s < a.spreads; s++) {
    Row sigma = half(rms * a.spread[s]);
    // Sweep 0 is the elimination, in which the errors so far correct the next coordinate; then come descents, in which
    // all errors do. Sums over whole blocks first, and what changes within the block one coordinate at a time.
    for (int sweep = 0; sweep <= a.passes; sweep++)
      for (int first = 0; first < n; first += BLOCK) {
        const float* m = (sweep ? metric : feedback) + first;
        const int here = std::min(BLOCK, n - first);
        products(here, m, n, w.e.data(), sweep ? n : first, part);
        for (int r = 0; r < here; r++) {
          const int i = first + r;
          const Row width = sigma * step[i], before = sweep ? w.e[i] : Row{};
          const Row pull = sweep ? part[r] / m[int64_t(i) * n + r] - before : part[r];
          w.code[i] = quantize(w.y[i] + pull, width, top);
          w.e[i] = w.y[i] - width * (w.code[i] - top / 2);
          const Row change = w.e[i] - before;
          for (int later = r + 1; later < here; later++) part[later] += m[int64_t(i) * n + later] * change;
        }
      }
    Row error = form(metric, n, w.e.data(), w.e.data());
    if (a.unbiased) {  // the gain that makes y' M y_hat = y' M y, and the error e + (1 - gain) y_hat that it leaves
      Row cross{};
      for (int i = 0; i < n; i++) cross += (w.y[i] - w.e[i]) * w.seen[i];
      Row gain = energy / select(cross > all(1e-30f), cross, all(1e-30f));
      Row kept = half(sigma * select(gain > all(0.0f), gain, all(1.0f)));
      Row less = 1.0f - kept / sigma, size = error - energy + 2 * cross;
      error += less * (2 * (cross - size) + less * size);
      sigma = kept;
    }
    Mask better = s ? (Mask)(error < best_error) : (Mask)(all(0.0f) == all(0.0f));
    best_error = select(better, error, best_error);
    best_scale = select(better, sigma, best_scale);
    for (int i = 0; i < n; i++) w.best[i] = select(better, w.code[i], w.best[i]);
  }
  for (int l = 0; l < rows; l++) {
    scale[l] = best_scale[l];
    for (int i = 0; i < n; i++) {
      float c = w.best[i][l];
      codes[int64_t(l) * n + i] = c >= 0 && c <= top ? uint8_t(c) : 0;  // a non-finite row has no code
    }
  }
}

}  // namespace

extern "C" int headq_feedback_args_size() { return int(sizeof(Args)); }

// Returns 1 where there is no memory for the working set.
extern "C" int headq_feedback_codes(const Args* args) {
  const Args& a = *args;
  int64_t tiles = (a.rows + LANES - 1) / LANES, work = int64_t(a.batch) * a.heads * tiles;
  int failed = 0;
#pragma omp parallel num_threads(a.threads)
  {
    try {
      Work w(a.width);
#pragma omp for schedule(static)
      for (int64_t item = 0; item < work; item++) {
        int64_t head = item / tiles, first = item % tiles * LANES;
        int rows = int(std::min<int64_t>(LANES, a.rows - first));
        const float* y = a.y + (head * a.rows + first) * a.width;
        for (int i = 0; i < a.width; i++)
          for (int l = 0; l < LANES; l++) w.y[i][l] = l < rows ? y[int64_t(l) * a.width + i] : 0.0f;
        int64_t m = a.matrix[head];
        tile(a, a.metric + m * a.width * a.width, a.feedback + m * a.width * a.width, a.step + m * a.width, w,
             a.codes + (head * a.rows + first) * a.width, a.scale + head * a.rows + first, rows);
      }
    } catch (const std::bad_alloc&) {
#pragma omp atomic write
      failed = 1;
    }
  }
  return failed;
}
