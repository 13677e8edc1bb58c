# SPDX-License-Identifier: MIT
#
# keel_instruction_sets(<target> <entry> <source>...)
#
# Compiles sources of an executable once for each instruction set, to be chosen at run time; the rest of it is compiled
# as KEEL_NATIVE says: without that option, the executable runs on any processor of its kind. <entry> is a pattern for
# the mangled name of the one function by which each copy is entered; it lives in a namespace called KEEL_ISA.
# KEEL_INSTRUCTION_SETS is defined in the target as X(name) for each set, best first.
#
# keel's own functions carry the instruction set in their names, but those of the standard library do not, nor those of
# Eigen and xsimd: of every copy of a template the linker keeps one, and could well keep the AVX-512 one for everybody.
# Therefore the object files of a set become one, all of whose names but the entry's are made local.
#
# Where that is impossible (another processor, no GNU binutils, sanitizers, which count on these names) there is one copy,
# compiled like the rest.
include(CheckCXXCompilerFlag)

set(KEEL_SETS "")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$" AND CMAKE_EXECUTABLE_FORMAT STREQUAL ELF AND CMAKE_OBJCOPY
   AND NOT "${CMAKE_CXX_FLAGS}" MATCHES "-fsanitize|-march")
    execute_process(COMMAND ${CMAKE_LINKER} --help OUTPUT_VARIABLE help ERROR_QUIET)
    if(help MATCHES "force-group-allocation")
        set(KEEL_SETS portable)
    endif()
endif()
if(KEEL_SETS)
    set(KEEL_FLAGS_portable "")
    set(KEEL_FLAGS_avx2 -march=x86-64-v3)
    set(KEEL_FLAGS_avx512bf16 -march=x86-64-v4 -mavx512vnni -mavx512bf16)
    set(KEEL_FLAGS_amx ${KEEL_FLAGS_avx512bf16} -mamx-tile -mamx-int8 -mamx-bf16)
    foreach(isa IN ITEMS avx2 avx512bf16 amx)
        string(REPLACE ";" " " flags "${KEEL_FLAGS_${isa}}")
        check_cxx_compiler_flag("${flags}" KEEL_COMPILES_${isa})
        if(KEEL_COMPILES_${isa})
            list(PREPEND KEEL_SETS ${isa})
        endif()
    endforeach()
endif()

function(keel_instruction_sets target entry)
    if(NOT KEEL_SETS)
        target_sources(${target} PRIVATE ${ARGN})
        return()
    endif()
    set(sets "")
    foreach(isa IN LISTS KEEL_SETS)
        string(APPEND sets "X(${isa})")
        set(copy ${target}_${isa})
        add_library(${copy} OBJECT ${ARGN})
        set_target_properties(${copy} PROPERTIES KEEL_INSTRUCTION_SET ${isa})
        target_link_libraries(${copy} PRIVATE keel_own)
        # A unique symbol would stay global.
        target_compile_options(${copy} PRIVATE ${KEEL_FLAGS_${isa}} $<$<CXX_COMPILER_ID:GNU>:-fno-gnu-unique>)
        set(object ${CMAKE_CURRENT_BINARY_DIR}/${copy}.o)
        add_custom_command(OUTPUT ${object} DEPENDS ${copy} $<TARGET_OBJECTS:${copy}> COMMAND_EXPAND_LISTS VERBATIM
            COMMAND ${CMAKE_LINKER} -r --force-group-allocation -o ${object}.all $<TARGET_OBJECTS:${copy}>
            COMMAND ${CMAKE_OBJCOPY} --wildcard --keep-global-symbol=${entry} ${object}.all ${object}
            COMMAND ${CMAKE_COMMAND} -E rm ${object}.all
            COMMENT "Making the names of ${copy} local")
        set_source_files_properties(${object} PROPERTIES EXTERNAL_OBJECT ON GENERATED ON)
        target_sources(${target} PRIVATE ${object})
    endforeach()
    target_compile_definitions(${target} PRIVATE KEEL_INSTRUCTION_SETS=${sets})
endfunction()
