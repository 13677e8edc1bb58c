# SPDX-License-Identifier: MIT
include(FetchContent)
include(${CMAKE_CURRENT_LIST_DIR}/native.cmake)

# keel_dependency(<package> <target> <oldest version> <include folder> <where FetchContent gets it>...)
#
# Makes the target of a header-only library: the host project's own if it has one, else the system's, else a pinned
# release. Of a downloaded one only the headers are used, not its build system (SOURCE_SUBDIR names nothing).
function(keel_dependency package target oldest include)
    if(TARGET ${target})
        return()
    endif()
    FetchContent_Declare(${package} ${ARGN} SOURCE_SUBDIR headers-only FIND_PACKAGE_ARGS CONFIG GLOBAL)
    FetchContent_MakeAvailable(${package})
    if(${package}_VERSION AND ${package}_VERSION VERSION_LESS oldest)
        message(FATAL_ERROR "keel needs ${package} ${oldest} or later, but found ${${package}_VERSION} in "
                            "${${package}_DIR}. Add -DCMAKE_DISABLE_FIND_PACKAGE_${package}=ON to download one.")
    endif()
    if(NOT TARGET ${target})
        string(TOLOWER ${package} folder)
        add_library(${target} INTERFACE IMPORTED GLOBAL)
        target_include_directories(${target} INTERFACE ${${folder}_SOURCE_DIR}/${include})
    endif()
endfunction()
