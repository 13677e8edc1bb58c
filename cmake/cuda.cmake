# SPDX-License-Identifier: MIT
# keel::cuda, the device code of include/keel/backend/cuda, from the one source file that may include it.
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
    message(STATUS "keel: no CUDA compiler found, so there is no keel::cuda; everything else is built")
    return()
endif()
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
if(NOT DEFINED KEEL_CUDA_ARCHITECTURES)
    set(KEEL_CUDA_ARCHITECTURES 80 90a-real)  # A100 and H100 in machine code; PTX of 80 serves the rest
endif()

# keel_cuda_sources(<target>): the .cu files of a target are compiled as keel's are.
function(keel_cuda_sources target)
    # CMake 3.25 does not know that nvcc speaks C++20, and adds no flag of its own where extensions are on.
    set_target_properties(${target} PROPERTIES CUDA_EXTENSIONS ON CUDA_ARCHITECTURES "${KEEL_CUDA_ARCHITECTURES}"
                          COMPILE_WARNING_AS_ERROR ${KEEL_WERROR})
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-std=c++20>)
    target_include_directories(${target} PRIVATE ${PROJECT_SOURCE_DIR}/include)
    target_link_libraries(${target} PUBLIC CUDA::cudart_static)
endfunction()

if(EXISTS ${PROJECT_SOURCE_DIR}/cmake/keel_cuda.cu)
    add_library(keel_cuda STATIC cmake/keel_cuda.cu)
    add_library(keel::cuda ALIAS keel_cuda)
    keel_cuda_sources(keel_cuda)
    set_target_properties(keel_cuda PROPERTIES EXPORT_NAME cuda POSITION_INDEPENDENT_CODE ON)
    target_link_libraries(keel_cuda INTERFACE keel)
endif()
