// What this machine can do, measured: the limits that speed figures are fractions of.
#pragma once
#include <cstddef>

namespace galley {

double probe_bandwidth(int threads, double megabytes, double seconds);  // GB/s read, all threads together
double probe_int8(int threads, double seconds);                        // 10^9 multiply-or-add per second
double probe_roundtrip(double seconds);                                // ns, core to core and back

}  // namespace galley
