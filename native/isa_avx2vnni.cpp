#define GALLEY_NS galley::avx2vnni
#define GALLEY_NAME "avx2-vnni"
#define GALLEY_VNNI
#include "kernels.hpp"
#include "simd_avx2.hpp"
#include "quantise.inc.hpp"
#include "isa.inc.hpp"
