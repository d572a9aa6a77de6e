// The portable source with fused multiply-adds: the reference on x86-64, whose baseline has none. (On arm64 the portable
// kernels themselves fuse.)
#define GALLEY_NS galley::fused
#define GALLEY_NAME "portable, fused"
#include "kernels.hpp"
#include "simd_portable.hpp"
#include "quantise.inc.hpp"
#include "isa.inc.hpp"
