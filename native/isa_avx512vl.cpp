// The source of avx2-vnni in the encodings of AVX-512: 256-bit registers, for processors that have only those dot products.
#define GALLEY_NS galley::avx512vl
#define GALLEY_NAME "avx512vl-vnni"
#define GALLEY_VNNI
#include "kernels.hpp"
#include "simd_avx2.hpp"
#include "quantise.inc.hpp"
#include "isa.inc.hpp"
