#define GALLEY_NS galley::portable
#define GALLEY_NAME "portable"
#include "kernels.hpp"
#include "simd_portable.hpp"
#include "quantise.inc.hpp"
#include "isa.inc.hpp"
