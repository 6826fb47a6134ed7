// Appending a call's tokens to a paged cache on the CPU, in one call: see reference.py. Tokens that leave the window are
// centred, mapped, quantized and put into their pages; then the new ones go to the window.
#include "../error_feedback/error_feedback.h"

#include <cstring>
#include <memory>
#include <new>

namespace {

using namespace headq;

constexpr int64_t PARALLEL_BYTES = 1 << 16;  // of a tensor, that threads share the moves of tensors
constexpr int64_t UNIT = 32;  // tokens that a thread takes at a time; no byte of a page is shared between two of them
enum Form { EXACT, FEEDBACK, NEAREST, AFFINE, SHARED };  // shared: values that are their keys
enum { FP32 = 1, BF16, FP16 };

struct Plane {
  uint8_t* data;
  int64_t page, head;
  const int32_t* column;  // keys: coordinate | shift << 16 of each column, -1: padding
  int32_t width, granules, shift, padding;
};
struct Numbers { char* data; int64_t page, head, token; };       // of scales or zeros, strides in bytes; the groups of a token lie together
struct Matrix { const float* data; int64_t batch, head; };
struct Tokens { char* data; int64_t batch, head, token; };      // strides in bytes; of pages: batch is the page

// One side of one head group, and how it is encoded.
struct Side {
  int32_t form, values, dim, base, side, bits, planes, groups, unbiased, folded;
  float step;
  int32_t byte_scale;  // else fp16
  const int32_t* coordinate_bits;  // [base + side]
  Plane plane[3];
  Numbers scale, zero;
  Tokens exact;
  Matrix encode, mean, unit, steps, hessian, ldl, read, side_encode, side_step;  // read: transposed, [base, dim]
};

struct Rows { char* data; int64_t row, parts, part, bytes; };  // of a row: parts of so many bytes; row and part: strides in bytes

struct Group {
  int32_t first, heads;
  Side side[2];
};

struct Args {
  int32_t batch, kv_heads, page_tokens, columns, n_sink, body, ring, slots, dtype, threads, check_finite, groups, bad, padding;
  int64_t most, table_row, window_row;
  int32_t dim[2];
  const int32_t *table, *window_table;                // [batch, columns]; [batch, ..], pages of `ring` tokens, or null: a ring of each sequence
  const int64_t *packed, *after, *held, *total, *start;  // [batch]; start may be null
  Tokens window[2], added[2], sinks[2];               // of keys, of values; sinks with a window_table
  const float* frame;                                 // [frames, 2, dim[0]], or null: see SegmentFrame in types.py
  const int32_t* partner;                             // [dim[0]]
  int32_t frames, frame_tokens;
};

inline const float* of(const Matrix& m, int64_t b, int64_t h) { return m.data ? m.data + b * m.batch + h * m.head : nullptr; }
inline char* of(const Tokens& t, int64_t b, int64_t h, int64_t token) { return t.data + b * t.batch + h * t.head + token * t.token; }

inline char* of(const Numbers& x, int64_t page, int64_t h, int offset) { return x.data + page * x.page + h * x.head + offset * x.token; }

inline uint16_t half_bits(float x) {  // of a number that fp16 holds
#if defined(__F16C__)
  return uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#else
  uint32_t u;
  std::memcpy(&u, &x, 4);
  const uint32_t sign = (u >> 16) & 0x8000, exponent = (u >> 23) & 255;
  if (exponent == 255) return uint16_t(sign | 0x7c00 | ((u & 0x7fffff) ? 0x200 : 0));
  if (exponent < 113) return uint16_t(sign | uint32_t(std::fabs(x) * 16777216.0f));
  return uint16_t(sign | (exponent - 112) << 10 | (u >> 13 & 1023));
#endif
}

inline float half_value(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
  float f;
  uint32_t u = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
  if (exponent == 0) {
    f = std::ldexp(float(mantissa), -24);
    return sign ? -f : f;
  }
  std::memcpy(&f, &u, 4);
  return f;
#endif
}

void to_float(const char* from, int dtype, int n, float* to) {
  if (dtype == FP32) {
    std::memcpy(to, from, 4 * size_t(n));
    return;
  }
  const uint16_t* x = (const uint16_t*)from;
  if (dtype == FP16) {
    for (int i = 0; i < n; i++) to[i] = half_value(x[i]);
    return;
  }
  for (int i = 0; i < n; i++) {
    const uint32_t u = uint32_t(x[i]) << 16;
    std::memcpy(to + i, &u, 4);
  }
}

bool finite(const char* from, int dtype, int n) {
  uint32_t most = 0;
  if (dtype == FP32) {
    const uint32_t* x = (const uint32_t*)from;
    for (int i = 0; i < n; i++) most = std::max(most, x[i] & 0x7fffffffu);
    return most < 0x7f800000u;
  }
  const uint16_t* x = (const uint16_t*)from;
  for (int i = 0; i < n; i++) most = std::max(most, uint32_t(x[i] & 0x7fff));
  return most < (dtype == FP16 ? 0x7c00u : 0x7f80u);
}

// What a thread works on: tokens of a unit, by side.
struct Buffers {
  int dim, coordinates;
  Scratch scratch;
  std::vector<float> x[2], y[2], scale[2], zero[2], step[2], decoded;
  std::vector<uint8_t> codes[2], whole;  // whole: base and side code of one token
  Buffers(int d, int m) : dim(d), coordinates(m), scratch(m), decoded(std::max(d, m)), whole(m) {
    for (int s = 0; s < 2; s++) {
      step[s].resize(m);
      x[s].resize(UNIT * d), y[s].resize(UNIT * m), codes[s].resize(UNIT * m);
      scale[s].resize(UNIT * m), zero[s].resize(UNIT * m);
    }
  }
};

// Those of this thread, kept from call to call; null where there is no memory.
Buffers* buffers(int dim, int coordinates) {
  static thread_local std::unique_ptr<Buffers> kept;
  try {
    if (!kept || kept->dim < dim || kept->coordinates < coordinates)
      kept.reset(new Buffers(std::max(dim, kept ? kept->dim : 0), std::max(coordinates, kept ? kept->coordinates : 0)));
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
  return kept.get();
}

inline float nearest_code(float x, float top) {
  x = std::nearbyint(x);
  x = x > 0.0f ? x : 0.0f;
  return x < top ? x : top;
}

// Between the least and the largest coordinate of each group.
void affine(const Side& s, const float* y, uint8_t* codes, float* scale, float* zero) {
  const int size = s.base / s.groups;
  const float top = float((1 << s.bits) - 1);
  for (int g = 0; g < s.groups; g++, y += size, codes += size) {
    const auto ends = std::minmax_element(y, y + size);
    const float delta = to_half(std::min(std::max((*ends.second - *ends.first) / top, 5.9604645e-8f), 65504.0f));
    const float low = std::min(std::max(*ends.first, -65504.0f), 65504.0f);
    const float from = low < 0 ? -to_half(-low) : to_half(low);
    for (int i = 0; i < size; i++) codes[i] = uint8_t(nearest_code((y[i] - from) / delta, top));
    scale[g] = delta, zero[g] = from;
  }
}

// The nearest levels around zero, in units of the group's RMS.
void nearest_levels(const Side& s, const float* steps, const float* y, uint8_t* codes, float* scale) {
  const int size = s.base / s.groups;
  auto stored = [](float x) { return to_half(std::min(std::max(x, 5.9604645e-8f), 65504.0f)); };
  for (int g = 0; g < s.groups; g++) {
    const int first = g * size;
    float square = 0, got = 0;
    for (int i = first; i < first + size; i++) square += y[i] * y[i];
    const float rms = std::sqrt(square / size), sigma = stored(s.folded ? rms * s.step : rms);
    for (int i = first; i < first + size; i++) {
      const float top = float((1 << s.coordinate_bits[i]) - 1), delta = s.folded ? sigma : sigma * steps[i];
      const float c = nearest_code(y[i] / delta + top / 2, top);
      codes[i] = uint8_t(c);
      got += y[i] * (delta * (c - top / 2));
    }
    const float gain = square / std::max(got, 1e-30f);
    scale[g] = s.unbiased ? stored(sigma * (gain > 0 ? gain : 1.0f)) : sigma;
  }
}

// Codes of the error that the base leaves, in units of its scale; x [dim], y [base] is overwritten.
void side_code(const Side& s, int64_t b, int64_t h, float* x, float* y, uint8_t* codes, float scale, float zero, float* decoded) {
  const float *steps = of(s.steps, b, h), *side_step = of(s.side_step, b, h);
  for (int i = 0; i < s.base; i++) {
    const float top = float((1 << s.coordinate_bits[i]) - 1);
    y[i] = s.form == AFFINE ? zero + scale * codes[i] : scale * (s.folded ? 1.0f : steps[i]) * (codes[i] - top / 2);
  }
  transform(y, of(s.read, b, h), 1, s.base, s.dim, decoded);
  for (int i = 0; i < s.dim; i++) x[i] -= decoded[i];
  transform(x, of(s.side_encode, b, h), 1, s.dim, s.side, decoded);
  for (int i = 0; i < s.side; i++) {
    const float top = float((1 << s.coordinate_bits[s.base + i]) - 1);
    codes[s.base + i] = uint8_t(nearest_code(decoded[i] / (scale * side_step[i]) + top / 2, top));
  }
}

// Where a token of a page goes: keys have bytes of their own, of values several share a byte.
void write_token(const Side& s, int64_t page, int64_t h, int offset, const uint8_t* codes, const float* scale, const float* zero) {
  for (int i = 0; i < s.planes; i++) {
    const Plane& p = s.plane[i];
    const int per_byte = 8 / p.width, mask = (1 << p.width) - 1;
    uint8_t* to = p.data + page * p.page + h * p.head;
    if (s.values) {
      const int tokens = 4 * per_byte, inside = offset % tokens, up = inside / 4 * p.width;
      to += int64_t(offset / tokens) * s.base * 4 + inside % 4;
      for (int c = 0; c < s.base; c++) {
        uint8_t& byte = to[4 * c];
        byte = uint8_t((byte & ~(mask << up)) | ((codes[c] >> p.shift) & mask) << up);
      }
      continue;
    }
    to += int64_t(offset / TILE) * p.granules * 4 * TILE + offset % TILE * 4;
    const int32_t* column = p.column;
    for (int g = 0; g < p.granules; g++, column += 4 * per_byte)
      for (int byte = 0; byte < 4; byte++) {
        int packed = 0;
        for (int k = 0; k < per_byte; k++) {
          const int32_t at = column[4 * k + byte];
          if (at >= 0) packed |= ((codes[at & 0xffff] >> (at >> 16)) & mask) << (k * p.width);
        }
        to[g * 4 * TILE + byte] = uint8_t(packed);
      }
  }
  for (int g = 0; g < s.groups; g++) {
    char* to = of(s.scale, page, h, offset);
    if (s.byte_scale) *to = char(byte_of_scale(scale[g]));
    else ((uint16_t*)to)[g] = half_bits(scale[g]);
    if (s.zero.data) ((uint16_t*)of(s.zero, page, h, offset))[g] = half_bits(zero[g]);
  }
}

// Where the body token j of a sequence lies now: in the ring, or among the call's own.
inline const char* source(const Args& a, int side, int64_t b, int64_t head, int64_t j) {
  const int64_t position = j + a.body;
  if (position < a.held[b]) {
    if (a.window_table) return of(a.window[side], a.window_table[b * a.window_row + position / a.ring], head, position % a.ring);
    return of(a.window[side], b, head, a.n_sink + j % a.ring);
  }
  const int64_t number = (a.start ? a.start[b] : 0) + position - a.held[b];
  return of(a.added[side], b, head, std::min<int64_t>(std::max<int64_t>(number, 0), a.slots - 1));
}

// A key of body token j into the frame of its segment, in fp64: other builds then find the same numbers.
void into_frame(const Args& a, int64_t j, float* x, float* work) {
  const int64_t frame = std::min<int64_t>(j / a.frame_tokens, a.frames - 1);
  const int n = a.dim[0];
  const float *c = a.frame + frame * 2 * n, *d = c + n;
  const int32_t* partner = a.partner;
  std::copy_n(x, n, work);
#pragma omp simd
  for (int i = 0; i < n; i++) x[i] = float(double(work[i]) * c[i] + double(work[partner[i]]) * d[i]);
}

inline Quadratic quadratic(const Side& s, const float* steps, int64_t b, int64_t h) {
  return {of(s.hessian, b, h), of(s.ldl, b, h), steps, s.base, float((1 << s.bits) - 1), s.unbiased != 0, s.byte_scale != 0};
}

// Body tokens [from, to) of one sequence and head into their pages.
void pack(const Args& a, const Group& group, int64_t b, int64_t h, int64_t from, int64_t to, Buffers& w) {
  const int n = int(to - from);
  auto page = [&](int64_t j) { return int64_t(a.table[b * a.table_row + j / a.page_tokens % a.columns]); };
  Quadratic q[2];
  bool feedback[2] = {};
  for (int k = 0; k < 2; k++) {
    const Side& s = group.side[k];
    if (s.form == SHARED) continue;
    for (int t = 0; t < n; t++) {
      const char* token = source(a, k, b, group.first + h, from + t);
      if (s.form == EXACT) {
        std::memcpy(of(s.exact, page(from + t), h, (from + t) % a.page_tokens), token, size_t(s.dim) * (a.dtype == FP32 ? 4 : 2));
        continue;
      }
      float* x = w.x[k].data() + int64_t(t) * s.dim;
      to_float(token, a.dtype, s.dim, x);
      if (!k && a.frame) into_frame(a, from + t, x, w.decoded.data());
      if (s.unit.data)
        for (int i = 0; i < s.dim; i++) x[i] /= *of(s.unit, b, h);
      if (const float* mean = of(s.mean, b, h))
        for (int i = 0; i < s.dim; i++) x[i] -= mean[i];
    }
    if (s.form != EXACT) transform(w.x[k].data(), of(s.encode, b, h), n, s.dim, s.base, w.y[k].data());
    if (s.form == FEEDBACK) {
      const float* steps = of(s.steps, b, h);
      if (s.folded) {
        std::fill_n(w.step[k].begin(), s.base, s.step);
        steps = w.step[k].data();
      }
      q[k] = quadratic(s, steps, b, h), feedback[k] = true;
    }
  }
  if (n == 1 && feedback[0] && feedback[1] && q[0].n == q[1].n) {  // keys and values side by side
    Work<V8>* work[2] = {&w.scratch.narrow[0], &w.scratch.narrow[1]};
    const float* y[2] = {w.y[0].data(), w.y[1].data()};
    uint8_t* codes[2] = {w.codes[0].data(), w.codes[1].data()};
    float* sigma[2] = {w.scale[0].data(), w.scale[1].data()};
    round_few<V8, 2>(q, work, y, 1, codes, sigma);
  } else {
    for (int k = 0; k < 2; k++)
      if (feedback[k]) round_tokens(q[k], w.scratch, w.y[k].data(), n, w.codes[k].data(), w.scale[k].data());
  }
  for (int k = 0; k < 2; k++) {
    const Side& s = group.side[k];
    if (s.form == EXACT || s.form == SHARED) continue;
    for (int t = 0; t < n; t++) {
      float* y = w.y[k].data() + int64_t(t) * s.base;
      uint8_t* codes = w.codes[k].data() + int64_t(t) * s.base;
      float *scale = w.scale[k].data() + int64_t(t) * s.groups, *zero = w.zero[k].data() + int64_t(t) * s.groups;
      if (s.form == AFFINE) affine(s, y, codes, scale, zero);
      if (s.form == NEAREST) nearest_levels(s, of(s.steps, b, h), y, codes, scale);
      if (s.form == FEEDBACK && s.folded) *scale = to_half(std::min(std::max(*scale * s.step, 5.9604645e-8f), 65504.0f));
      if (s.side) {
        std::copy_n(codes, s.base, w.whole.begin());
        codes = w.whole.data();
        side_code(s, b, h, w.x[k].data() + int64_t(t) * s.dim, y, codes, *scale, *zero, w.decoded.data());
      }
      write_token(s, page(from + t), h, int((from + t) % a.page_tokens), codes, scale, zero);
    }
  }
}

// The call's tokens of one sequence, head and side into sinks and ring: the last that belongs to each slot.
void append(const Args& a, int side, int64_t b, int64_t head) {
  const int64_t held = a.held[b], total = a.total[b], start = a.start ? a.start[b] : 0;
  const size_t bytes = size_t(a.dim[side]) * (a.dtype == FP32 ? 4 : 2);
  auto put = [&](int64_t p, char* to) {
    const int64_t number = std::min<int64_t>(std::max<int64_t>(start + p - held, 0), a.slots - 1);
    std::memcpy(to, of(a.added[side], b, head, number), bytes);
  };
  if (a.window_table) {
    for (int64_t p = held; p < std::min<int64_t>(total, a.n_sink); p++) put(p, of(a.sinks[side], a.table[b * a.table_row], head, p));
    for (int64_t p = held; p < total; p++) put(p, of(a.window[side], a.window_table[b * a.window_row + p / a.ring], head, p % a.ring));
    return;
  }
  for (int64_t p = held; p < std::min<int64_t>(total, a.n_sink); p++) put(p, of(a.window[side], b, head, p));
  for (int64_t p = std::max(std::max<int64_t>(held, a.n_sink), total - a.ring); p < total; p++)
    put(p, of(a.window[side], b, head, a.n_sink + (p - a.n_sink) % a.ring));
}

// The first side and sequence whose new tokens are not all finite, as side * batch + sequence; -1: none.
int not_finite(const Args& a) {
  for (int side = 0; side < 2; side++)
    for (int64_t b = 0; b < a.batch; b++)
      for (int64_t h = 0; h < a.kv_heads; h++)
        for (int64_t t = 0; t < a.total[b] - a.held[b]; t++)
          if (!finite(of(a.added[side], b, h, (a.start ? a.start[b] : 0) + t), a.dtype, a.dim[side])) return side * a.batch + int(b);
  return -1;
}

}  // namespace

extern "C" int headq_update_args_size() { return int(sizeof(Args)); }
extern "C" int headq_update_group_size() { return int(sizeof(Group)); }

// Returns 1 where there is no memory for the working set, 2 where a new token is not finite: args->bad says which.
extern "C" int headq_cache_update(Args* args, const Group* groups) {
  Args& a = *args;
  if (a.check_finite && (a.bad = not_finite(a)) >= 0) return 2;
  int64_t most = 0;
  for (int b = 0; b < a.batch; b++) most = std::max(most, a.after[b] - a.packed[b]);
  if (a.most >= 0) most = std::min(most, a.most);
  const int64_t units = most > 0 ? (most + UNIT - 2) / UNIT + 1 : 0, work = a.batch * a.kv_heads * units;
  const int64_t appended = int64_t(a.batch) * a.kv_heads * 2;
  int dim = 0, coordinates = 0, failed = 0;
  for (int g = 0; g < a.groups; g++)
    for (const Side& s : groups[g].side) dim = std::max(dim, s.dim), coordinates = std::max(coordinates, s.base + s.side);
#pragma omp parallel num_threads(a.threads) if (a.threads > 1 && (work > 1 || appended > 64))
  {
    Buffers* w = work ? buffers(dim, coordinates) : nullptr;
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < work; item++) {
      const int64_t b = item / (a.kv_heads * units), head = item / units % a.kv_heads, unit = item % units;
      const int64_t end = std::min(a.after[b], a.packed[b] + most), first = (a.packed[b] / UNIT + unit) * UNIT;
      const int64_t from = std::max(a.packed[b], first), to = std::min(end, first + UNIT);
      if (from >= to) continue;
      if (!w) {
#pragma omp atomic write
        failed = 1;
        continue;
      }
      const Group* group = groups;
      while (head >= group->first + group->heads) group++;
      pack(a, *group, b, head - group->first, from, to, *w);
    }
#pragma omp for schedule(static)
    for (int64_t item = 0; item < appended; item++)
      if (!failed) append(a, int(item % 2), item / 2 / a.kv_heads, item / 2 % a.kv_heads);
  }
  return failed;
}

// Row moves[2i + 1] becomes what row moves[2i] is, in turn; row -1 is beside each tensor. Returns 1 where there is no memory.
extern "C" int headq_move_rows(const Rows* tensors, int32_t n, const int64_t* moves, int64_t n_moves, int32_t threads) {
  int64_t most = 0;
  int failed = 0;
  for (int i = 0; i < n; i++) most = std::max(most, tensors[i].parts * tensors[i].bytes);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1 && most * n_moves > PARALLEL_BYTES)
  for (int i = 0; i < n; i++) {
    const Rows& t = tensors[i];
    std::unique_ptr<char[]> beside;
    for (const int64_t* m = moves; m < moves + 2 * n_moves; m += 2) {
      if (m[1] < 0 && !beside) beside.reset(new (std::nothrow) char[t.parts * t.bytes]);
      if (!beside && (m[0] < 0 || m[1] < 0)) {
#pragma omp atomic write
        failed = 1;
        break;
      }
      const int64_t from_part = m[0] < 0 ? t.bytes : t.part, to_part = m[1] < 0 ? t.bytes : t.part;
      const char* from = m[0] < 0 ? beside.get() : t.data + m[0] * t.row;
      char* to = m[1] < 0 ? beside.get() : t.data + m[1] * t.row;
      for (int64_t p = 0; p < t.parts; p++) std::memcpy(to + p * to_part, from + p * from_part, t.bytes);
    }
  }
  return failed;
}
