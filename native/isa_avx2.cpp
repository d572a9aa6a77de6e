#define GALLEY_NS galley::avx2
#define GALLEY_NAME "avx2"
#include "kernels.hpp"
#include "simd_avx2.hpp"
#include "quantise.inc.hpp"
#include "isa.inc.hpp"
