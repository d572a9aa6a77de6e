// AVX-VNNI on x86-64 processors without it.
#pragma once

namespace galley {

// From now on this process carries out the VEX form of vpdpbusd itself wherever the processor refuses it: the code under
// test is the code that ships, and only that one operation is not the processor's. Other refused instructions end the
// process as before. Throws std::runtime_error on processors without AVX2.
void emulate_vpdpbusd();
long emulated();  // how often

}  // namespace galley
