#define GALLEY_NS galley::avx512vnni
#define GALLEY_NAME "avx512-vnni"
#include "kernels.hpp"
#include "simd_avx512.hpp"
#include "isa.inc.hpp"
