// Viterbi's algorithm over a bit-shift trellis, row by row: what viterbi() of trellis_code.py says.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <new>
#include <vector>

namespace {

struct Args {
  int32_t rows, width, bits, classes, has_metric, has_start, threads;
  const float *x;               // [rows, width]
  const float *levels;          // [2^bits, classes]: of class c and symbol b at [b][c]
  const float *factor, *weight; // [width, width] and [width], of the metric
  const int64_t *start;         // [rows]
  uint8_t *symbols;             // [rows, width]
};

struct Scratch {
  std::vector<float> cost, target, cand, pulls, next;
  std::vector<int32_t> pick;
  std::vector<uint8_t> picks;
  Scratch(const Args& a, int k)
      : cost(a.classes), target(a.classes), cand(size_t(a.classes) * k),
        pulls(a.has_metric ? size_t(a.classes) * a.width : 0), next(pulls.size()), pick(a.classes),
        picks(size_t(a.classes) * a.width) {}
};

// Costs of the states that class c and each symbol lead to, over the survivors of the classes.
void extend(const Args& a, Scratch& s, int k, int j, float x) {
  const int n = a.classes;
  float *target = s.target.data(), *cost = s.cost.data();
  const float w = a.has_metric ? a.weight[j] : 1.0f;
  for (int c = 0; c < n; c++) target[c] = a.has_metric ? x + s.pulls[size_t(c) * a.width + j] : x;
  for (int b = 0; b < k; b++) {
    const float* level = a.levels + size_t(b) * n;
    float* cand = s.cand.data() + size_t(b) * n;
    for (int c = 0; c < n; c++) {
      const float miss = target[c] - level[c];
      cand[c] = cost[c] + miss * miss * w;
    }
  }
}

// The best of the 2^bits states that go over into each class: class k·m + b comes from classes p·C/k + m by symbol b.
void select(const Args& a, Scratch& s, int k, uint8_t* picks) {
  const int part = a.classes / k;
  float* best = s.target.data();
  int32_t* pick = s.pick.data();
  for (int b = 0; b < k; b++) {
    const float* cand = s.cand.data() + size_t(b) * a.classes;
    for (int m = 0; m < part; m++) best[m] = cand[m], pick[m] = 0;
    for (int p = 1; p < k; p++) {
      const float* other = cand + p * part;
      for (int m = 0; m < part; m++) {
        pick[m] = other[m] < best[m] ? p : pick[m];
        best[m] = other[m] < best[m] ? other[m] : best[m];
      }
    }
    for (int m = 0; m < part; m++) s.cost[k * m + b] = best[m], picks[k * m + b] = uint8_t(pick[m]);
  }
}

// What the errors of each class's survivor pull the coordinates to come to.
void feed_back(const Args& a, Scratch& s, int k, int j, float x, const uint8_t* picks) {
  const int part = a.classes / k;
  const float* row = a.factor + size_t(j) * a.width;
  for (int c = 0; c < a.classes; c++) {
    const int from = picks[c] * part + c / k;
    const float error = x - a.levels[size_t(c % k) * a.classes + from];
    const float* __restrict old = s.pulls.data() + size_t(from) * a.width;
    float* __restrict made = s.next.data() + size_t(c) * a.width;
    for (int i = (j + 1) & -16; i < a.width; i++)  // whole vectors; what is before j is not looked at again
      made[i] = old[i] + error * row[i];
  }
  s.pulls.swap(s.next);
}

void code_row(const Args& a, Scratch& s, int64_t row) {
  const int k = 1 << a.bits, part = a.classes / k;
  const float* x = a.x + row * a.width;
  std::fill(s.cost.begin(), s.cost.end(), a.has_start ? std::numeric_limits<float>::infinity() : 0.0f);
  if (a.has_start) s.cost[a.start[row]] = 0.0f;
  std::fill(s.pulls.begin(), s.pulls.end(), 0.0f);
  for (int j = 0; j < a.width; j++) {
    uint8_t* picks = s.picks.data() + size_t(j) * a.classes;
    extend(a, s, k, j, x[j]);
    select(a, s, k, picks);
    if (a.has_metric && j + 1 < a.width) feed_back(a, s, k, j, x[j], picks);
  }
  int at = a.has_start ? int(a.start[row]) : int(std::min_element(s.cost.begin(), s.cost.end()) - s.cost.begin());
  for (int j = a.width - 1; j >= 0; j--) {
    a.symbols[row * a.width + j] = uint8_t(at % k);
    at = s.picks[size_t(j) * a.classes + at] * part + at / k;
  }
}

}  // namespace

extern "C" int trellis_args_size() { return int(sizeof(Args)); }

// Returns 1 where there is no memory for the working set.
extern "C" int trellis_codes(const Args* args) {
  const Args& a = *args;
  int failed = 0;
#pragma omp parallel num_threads(a.threads)
  {
    try {
      Scratch scratch(a, 1 << a.bits);
#pragma omp for schedule(static)
      for (int64_t row = 0; row < a.rows; row++) code_row(a, scratch, row);
    } catch (const std::bad_alloc&) {
#pragma omp atomic write
      failed = 1;
    }
  }
  return failed;
}
