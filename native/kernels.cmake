# What every build of the kernels shares: the sources, and the instruction sets of the target architecture. Each of those
# is its own translation unit in its own namespace; everything else assumes none.
set(galley_sources)
foreach(name arena attention dispatch isa_portable lowrank model pack pool probe sample weights)
  list(APPEND galley_sources ${CMAKE_CURRENT_LIST_DIR}/${name}.cpp)
endforeach()

function(galley_isa name)
  list(APPEND galley_sources ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/isa_${name}.cpp)
  set(galley_sources ${galley_sources} PARENT_SCOPE)
  set_source_files_properties(${CMAKE_CURRENT_FUNCTION_LIST_DIR}/isa_${name}.cpp PROPERTIES COMPILE_OPTIONS "${ARGN}")
endfunction()

# GCC 12 takes minutes at -O3 over the unrolled lanes of portable code, half a minute at -O2 with the same cost model of
# the vectoriser.
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  set_source_files_properties(${CMAKE_CURRENT_LIST_DIR}/isa_portable.cpp PROPERTIES COMPILE_OPTIONS
    "-O2;-fvect-cost-model=dynamic")
endif()

if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
  set(avx2 -mavx2 -mfma -mf16c)
  # (GCC 12 warns of uninitialised values inside its own AVX-512 headers, bug 105593: silenced where they are used.)
  set(quiet -Wno-uninitialized -Wno-maybe-uninitialized)
  set(avx512 ${avx2} -mavx512f -mavx512vl -mavx512vnni ${quiet})
  set_source_files_properties(${CMAKE_CURRENT_LIST_DIR}/probe.cpp PROPERTIES COMPILE_OPTIONS "${quiet}")
  galley_isa(avx2 ${avx2})
  galley_isa(avx2vnni ${avx2} -mavxvnni)
  galley_isa(avx512vl ${avx512} -mprefer-vector-width=256)
  galley_isa(avx512 ${avx512} -mavx512bw -mavx512dq -mprefer-vector-width=512)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64")
  galley_isa(neon -march=armv8.2-a+dotprod)
endif()

# No contraction: where a fused multiply-add is wanted it is written, so that a row is rounded alike in every tile.
set(galley_options -ffp-contract=off -fno-math-errno -Wall -Wextra)
