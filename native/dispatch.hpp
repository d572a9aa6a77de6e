// Which kernels this processor can run, found before any of them is touched.
#pragma once
#include <string>
#include <vector>

#include "kernels.hpp"

namespace galley {

// Best first; "portable" is always last.
std::vector<std::string> isa_available();
// nullptr for one that is unknown, or that this processor lacks.
const Kernels* isa_find(const std::string& name);

}  // namespace galley
