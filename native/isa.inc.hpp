// One instruction set's kernels: the simd header was included before, GALLEY_NS and GALLEY_NAME are defined.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <type_traits>
#include <utility>

#include "kernels.hpp"

#include "vector.inc.hpp"
#include "linear.inc.hpp"
#include "attend.inc.hpp"
#include "attend_wide.inc.hpp"
#include "attend8.inc.hpp"
#include "attend_span.inc.hpp"
#include "sample.inc.hpp"
#include "dots.inc.hpp"

namespace GALLEY_NS {
extern const Kernels table;
const Kernels table = {GALLEY_NAME, kMaxTile, linear, quantise, rms_norm, silu_mul, rope, write_kv,
                       attend, join, finish, argmax, log_sum_exp, draw, dots};
}  // namespace GALLEY_NS
