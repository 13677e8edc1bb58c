# SPDX-License-Identifier: MIT
# Every header compiles alone, with the warnings of the project, and includes only what ARCHITECTURE.md lets it.

# Tests need not be built for it, so it is built by its own test; as a target, it compiles anew only what changed.
file(GLOB_RECURSE headers CONFIGURE_DEPENDS RELATIVE ${PROJECT_SOURCE_DIR}/include ${PROJECT_SOURCE_DIR}/include/*.hpp)
add_library(keel_headers OBJECT EXCLUDE_FROM_ALL)
target_link_libraries(keel_headers PRIVATE keel_own)
find_package(CUDAToolkit QUIET)
if(CUDAToolkit_FOUND)
    target_include_directories(keel_headers SYSTEM PRIVATE ${CUDAToolkit_INCLUDE_DIRS})
else()
    list(FILTER headers EXCLUDE REGEX "^keel/backend/cuda")
endif()
target_compile_options(keel_headers PRIVATE $<$<NOT:$<BOOL:${MSVC}>>:-O0>)
set(device_source)
foreach(header IN LISTS headers)
    # Twice: without #pragma once this would not compile.
    file(CONFIGURE OUTPUT headers/${header}.cpp CONTENT "#include <${header}>\n#include <${header}>\n")
    target_sources(keel_headers PRIVATE ${CMAKE_CURRENT_BINARY_DIR}/headers/${header}.cpp)
    if(header MATCHES "^keel/core/")
        string(APPEND device_source "#include <${header}>\n")
    endif()
endforeach()
cmake_host_system_information(RESULT cores QUERY NUMBER_OF_LOGICAL_CORES)
add_test(NAME headers/alone
         COMMAND ${CMAKE_COMMAND} --build ${PROJECT_BINARY_DIR} --target keel_headers --parallel ${cores})
set_tests_properties(headers/alone PROPERTIES RUN_SERIAL ON)

# core/ is also what device code is written in. This needs nvcc, but no GPU and no CUDA in this build.
if(CUDAToolkit_NVCC_EXECUTABLE)
    file(CONFIGURE OUTPUT headers/core.cu CONTENT "${device_source}")
    add_test(NAME headers/core_in_cuda
             COMMAND ${CUDAToolkit_NVCC_EXECUTABLE} -std=c++20 -arch=sm_80 -Werror all-warnings -ccbin ${CMAKE_CXX_COMPILER}
                     -I ${PROJECT_SOURCE_DIR}/include -c headers/core.cu -o headers/core.cu.o
             WORKING_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR})
    # The kernels, too; quickly, for nobody runs them.
    add_test(NAME headers/kernels
             COMMAND ${CUDAToolkit_NVCC_EXECUTABLE} -std=c++20 -gencode=arch=compute_90a,code=sm_90a -Werror all-warnings
                     -Xcicc -O1 -Xptxas -O0 -ccbin ${CMAKE_CXX_COMPILER} -I ${PROJECT_SOURCE_DIR}/include
                     -c ${PROJECT_SOURCE_DIR}/cmake/keel_cuda.cu -o headers/keel_cuda.cu.o
             WORKING_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR})
endif()

if(Python3_FOUND)
    add_test(NAME headers/includes
             COMMAND Python3::Interpreter ${PROJECT_SOURCE_DIR}/tools/check_includes.py ${PROJECT_SOURCE_DIR})
endif()

# cmake --build --preset tidy
find_program(KEEL_RUN_CLANG_TIDY NAMES run-clang-tidy run-clang-tidy-14)
mark_as_advanced(KEEL_RUN_CLANG_TIDY)
if(KEEL_RUN_CLANG_TIDY)
    # Not the copies for other instruction sets, whose flags are GCC's.
    add_custom_target(tidy COMMAND ${KEEL_RUN_CLANG_TIDY} -quiet -p ${PROJECT_BINARY_DIR}
                      "-header-filter=${PROJECT_SOURCE_DIR}/(include|tools|bench)/"
                      "/tests/headers/|/tools/keel/(?!model_)|/bench/keel-bench/(?!runner_)" USES_TERMINAL)
endif()
