# SPDX-License-Identifier: MIT

# keel_embed(<target> <symbol> <file>)
#
# Links the bytes of a file into an executable, without a pass of the compiler over them. In C++:
#   extern "C" const unsigned char symbol[], symbol_end[];      // 64-byte aligned
# Needs an assembler that speaks GNU's dialect: GCC and Clang for ELF, Mach-O and MinGW.
function(keel_embed target symbol file)
    get_filename_component(file ${file} ABSOLUTE)
    set(source ${CMAKE_CURRENT_BINARY_DIR}/${symbol}.S)
    configure_file(${PROJECT_SOURCE_DIR}/cmake/embed.S.in ${source} @ONLY)
    set_source_files_properties(${source} PROPERTIES OBJECT_DEPENDS ${file})
    target_sources(${target} PRIVATE ${source})
endfunction()
