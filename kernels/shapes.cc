// Do the shapes of a call fit together? Every fault names the input, what was expected and what was met.
#include <cinttypes>
#include <cstdarg>
#include <cstdio>

#include "low_rank_add.h"

namespace adapterx {
namespace {

struct Text {
  char of[96];
};

Text text(Dims dims) {
  Text result{};
  size_t at = static_cast<size_t>(std::snprintf(result.of, sizeof result.of, "["));
  for (size_t i = 0; i < dims.count && at + 24 < sizeof result.of; ++i)
    at += static_cast<size_t>(std::snprintf(result.of + at, sizeof result.of - at, i ? ", %" PRId64 : "%" PRId64, dims.of[i]));
  std::snprintf(result.of + at, sizeof result.of - at, "]");
  return result;
}

#if defined(__GNUC__)
__attribute__((format(printf, 1, 2)))
#endif
Fault fault(const char* format, ...) {
  Fault result;
  va_list values;
  va_start(values, format);
  const int head = std::snprintf(result.text, sizeof result.text, "LowRankAdd: ");
  std::vsnprintf(result.text + head, sizeof result.text - static_cast<size_t>(head), format, values);
  va_end(values);
  return result;
}

Dims leading(Dims dims) { return {dims.of, dims.count - 1}; }

Fault matrices(const Shapes& s, const LowRankAdd& call) {
  if (s.a.count != 2 || s.a.of[1] != call.d_in)
    return fault("a is %s, expected [R, d_in = %" PRId64 "], the last dimension of x", text(s.a).of, call.d_in);
  if (s.b.count != 2 || s.b.of[1] != call.d_out)
    return fault("b is %s, expected [R, d_out = %" PRId64 "], the last dimension of base", text(s.b).of, call.d_out);
  if (s.a.of[0] != s.b.of[0])
    return fault("a has R = %" PRId64 " rows and b has %" PRId64 ", they must have as many", s.a.of[0], s.b.of[0]);
  const bool codes = call.ports == Dtype::kInt8;
  if (s.scaled != codes)
    return fault(codes ? "scale is missing: int8 a and b need one, [R, 2]" : "scale is given, but a and b are not int8");
  if (codes && (s.scale.count != 2 || s.scale.of[0] != call.rank || s.scale.of[1] != 2))
    return fault("scale is %s, expected [R = %" PRId64 ", 2]", text(s.scale).of, call.rank);
  return {};
}

// Adds one loop inside the others; `size` is not 0.
bool enter(MaskRows* rows, int64_t size, int64_t step) {
  if (size == 1) return true;
  if (rows->loops) {
    const int last = rows->loops - 1;
    if (rows->step[last] == step * size) {
      rows->size[last] *= size;
      rows->step[last] = step;
      return true;
    }
  }
  if (rows->loops == MaskRows::kMost) return false;
  rows->size[rows->loops] = size;
  rows->step[rows->loops++] = step;
  return true;
}

Fault mask_of(const Shapes& s, LowRankAdd* call, size_t* leading_ones) {
  const Dims mask = s.mask, x = s.x;
  if (!mask.count) return fault("mask has no dimensions, expected [..., R = %" PRId64 "] or [..., 1]", call->rank);
  call->mask_width = mask.of[mask.count - 1];
  if (call->mask_width != call->rank && call->mask_width != 1)
    return fault("mask is %s, its last dimension must be R = %" PRId64 " or 1", text(mask).of, call->rank);
  *leading_ones = mask.count > x.count ? mask.count - x.count : 0;
  call->mask_count = 1;
  bool fits = true;
  for (size_t i = 0; i + 1 < mask.count; ++i) {
    call->mask_count *= mask.of[i];
    const int64_t met = i < *leading_ones ? 1 : x.of[x.count + i - mask.count];
    fits = fits && (mask.of[i] == 1 || mask.of[i] == met);
  }
  if (!fits) return fault("mask is %s, which does not broadcast against x %s", text(mask).of, text(x).of);
  call->mask_rows.loops = 0;
  if (!call->rows) return {};
  int64_t inner = call->mask_count;
  for (size_t i = 0; i + 1 < x.count; ++i) {
    const bool absent = i + mask.count < x.count;
    const int64_t size = absent ? 1 : mask.of[i + mask.count - x.count];
    inner /= size;
    if (!enter(&call->mask_rows, x.of[i], size == 1 ? 0 : inner))
      return fault("mask %s broadcasts against x %s in more than %d places", text(mask).of, text(x).of, MaskRows::kMost);
  }
  return {};
}

}  // namespace

Fault measure(const Shapes& s, LowRankAdd* call, size_t* leading_ones) {
  if (!takes(call->activations, call->ports)) return fault("this type of a and b cannot stand beside this type of x");
  if (!s.x.count || !s.base.count) return fault("x and base need at least one dimension");
  bool alike = s.x.count == s.base.count;
  for (size_t i = 0; alike && i + 1 < s.x.count; ++i) alike = s.x.of[i] == s.base.of[i];
  if (!alike) return fault("base is %s beside x %s: all but the last dimension must agree", text(s.base).of, text(s.x).of);
  call->d_in = s.x.of[s.x.count - 1];
  call->d_out = s.base.of[s.base.count - 1];
  call->rows = 1;
  for (int64_t i = 0; i < static_cast<int64_t>(leading(s.x).count); ++i) call->rows *= s.x.of[i];
  call->rank = s.a.count ? s.a.of[0] : 0;
  if (Fault wrong = matrices(s, *call)) return wrong;
  return mask_of(s, call, leading_ones);
}

}  // namespace adapterx
