#define GALLEY_NS galley::neon
#define GALLEY_NAME "neon-dotprod"
#include "kernels.hpp"
#include "simd_neon.hpp"
#include "quantise.inc.hpp"
#include "isa.inc.hpp"
