# SPDX-License-Identifier: MIT
# keel as others use it: fetched into a project, installed and found, compiled by a plain command line, and in several
# translation units of one program. The program and the lines of CMake are those of README.md.
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/README.md)
set(folder ${CMAKE_CURRENT_BINARY_DIR}/consumers)
file(READ ${PROJECT_SOURCE_DIR}/README.md readme)
string(REGEX MATCH "```cpp\n([^`]*)```" block "${readme}")
string(REPLACE 32768 8192 program "${CMAKE_MATCH_1}")  # the demonstration model is made for no longer context
file(CONFIGURE OUTPUT consumers/app.cpp CONTENT "${program}" @ONLY)
string(REGEX MATCH "```cmake\n([^`]*)```" block "${readme}")
file(CONFIGURE OUTPUT consumers/fetch.cmake CONTENT "${CMAKE_MATCH_1}" @ONLY)
configure_file(${PROJECT_SOURCE_DIR}/tools/data/demo-Q4_K_M.gguf consumers/kimi-linear.gguf COPYONLY)

# keel_consumer(<name> <source folder> <fixture it needs> <build type> <option>...): configures and builds a project.
# One is optimised, which takes most of a minute; the model is small enough for the others to do without.
function(keel_consumer name source needs type)
    add_test(NAME consumers/${name}/build
             COMMAND ${CMAKE_CTEST_COMMAND} --build-and-test ${source} ${folder}/${name}
                     --build-generator ${CMAKE_GENERATOR} --build-options -DCMAKE_BUILD_TYPE=${type}
                     -DCMAKE_CXX_COMPILER=${CMAKE_CXX_COMPILER} -DCMAKE_CXX_COMPILER_LAUNCHER=${CMAKE_CXX_COMPILER_LAUNCHER}
                     -DAPP=${folder}/app.cpp ${ARGN})
    set_tests_properties(consumers/${name}/build PROPERTIES FIXTURES_SETUP ${name} FIXTURES_REQUIRED "${needs}")
endfunction()

# keel_runs_readme_program(<name> <executable>): it writes text, whatever the text.
function(keel_runs_readme_program name executable)
    if(Python3_FOUND)
        add_test(NAME consumers/${name}/readme
                 COMMAND Python3::Interpreter ${CMAKE_CURRENT_SOURCE_DIR}/consumers/writes_text.py ${executable}
                 WORKING_DIRECTORY ${folder})
        set_tests_properties(consumers/${name}/readme PROPERTIES FIXTURES_REQUIRED ${name})
    endif()
endfunction()

keel_consumer(fetch ${CMAKE_CURRENT_SOURCE_DIR}/consumers/fetch "" Release
              -DFETCHCONTENT_SOURCE_DIR_KEEL=${PROJECT_SOURCE_DIR} -DFETCH=${folder}/fetch.cmake)
keel_runs_readme_program(fetch ${folder}/fetch/app)

# Two translation units share keel's functions if they are compiled for the same instruction set, and otherwise do not.
add_test(NAME consumers/two_units COMMAND ${folder}/fetch/two_units same)
set_tests_properties(consumers/two_units PROPERTIES FIXTURES_REQUIRED fetch)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
    add_test(NAME consumers/two_instruction_sets COMMAND ${folder}/fetch/two_instruction_sets different)
    set_tests_properties(consumers/two_instruction_sets PROPERTIES FIXTURES_REQUIRED fetch)
endif()

add_test(NAME consumers/install COMMAND ${CMAKE_COMMAND} --install ${PROJECT_BINARY_DIR} --prefix ${folder}/prefix)
set_tests_properties(consumers/install PROPERTIES FIXTURES_SETUP installed)
keel_consumer(package ${CMAKE_CURRENT_SOURCE_DIR}/consumers/package installed Debug
              -DCMAKE_PREFIX_PATH=${folder}/prefix -DVERSION=${PROJECT_VERSION})
keel_runs_readme_program(package ${folder}/package/app)

set(third_party "$<TARGET_PROPERTY:Eigen3::Eigen,INTERFACE_INCLUDE_DIRECTORIES>;$<TARGET_PROPERTY:xsimd,INTERFACE_INCLUDE_DIRECTORIES>")
add_test(NAME consumers/command_line/build
         COMMAND ${CMAKE_CXX_COMPILER} -std=c++20 -pthread -I${PROJECT_SOURCE_DIR}/include "-I$<JOIN:${third_party},;-I>"
                 app.cpp -o command_line
         COMMAND_EXPAND_LISTS WORKING_DIRECTORY ${folder})
set_tests_properties(consumers/command_line/build PROPERTIES FIXTURES_SETUP command_line)
keel_runs_readme_program(command_line ${folder}/command_line)

keel_consumer(examples ${PROJECT_SOURCE_DIR}/examples "" Debug)
if(Python3_FOUND)
    add_test(NAME consumers/examples
             COMMAND Python3::Interpreter ${CMAKE_CURRENT_SOURCE_DIR}/consumers/examples.py ${folder}/examples
                     ${folder}/kimi-linear.gguf)
    set_tests_properties(consumers/examples PROPERTIES FIXTURES_REQUIRED examples)
endif()
