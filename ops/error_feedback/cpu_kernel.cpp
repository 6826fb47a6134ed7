// Rounding with error feedback on the CPU: the tokens of all heads.
#include "error_feedback.h"

#include <memory>
#include <new>

namespace {

constexpr int64_t UNIT = 2 * headq::TILE;  // tokens that a thread takes at a time

struct Args {
  int32_t matrices, heads, batch, tokens, width, bits, unbiased, scale_bits, threads;
  const float *y;                  // [batch, heads, tokens, width]
  const float *hessian, *ldl;      // [matrices, width, width]
  const float *step;               // [matrices, width]
  const int32_t *matrix;           // [batch * heads], which matrix each head of each sequence uses
  uint8_t *codes;                  // [batch, heads, tokens, width]
  float *scale;                    // [batch, heads, tokens], values that fp16 holds
};

}  // namespace

extern "C" int headq_feedback_args_size() { return int(sizeof(Args)); }

// Returns 1 where there is no memory for the working set.
extern "C" int headq_feedback_codes(const Args* args) {
  const Args& a = *args;
  const int64_t units = (a.tokens + UNIT - 1) / UNIT, work = int64_t(a.batch) * a.heads * units, n = a.width;
  int failed = 0;
#pragma omp parallel num_threads(a.threads)
  {
    std::unique_ptr<headq::Scratch> scratch;
    try {
      scratch.reset(new headq::Scratch(a.width));
    } catch (const std::bad_alloc&) {
#pragma omp atomic write
      failed = 1;
    }
#pragma omp for schedule(static)
    for (int64_t item = 0; item < work; item++) {
      if (!scratch) continue;
      const int64_t head = item / units, first = item % units * UNIT, m = a.matrix[head];
      const headq::Quadratic q{a.hessian + m * n * n, a.ldl + m * n * n, a.step + m * n, a.width,
                               float((1 << a.bits) - 1), a.unbiased != 0, a.scale_bits == 8};
      const int64_t at = head * a.tokens + first;
      headq::round_tokens(q, *scratch, a.y + at * n, int(std::min<int64_t>(UNIT, a.tokens - first)), a.codes + at * n,
                          a.scale + at);
    }
  }
  return failed;
}
