# SPDX-License-Identifier: MIT
# The flags that compile for the processor of this machine; used in keel's build and by an installed keel.
if(MSVC)
    set(KEEL_NATIVE_FLAGS "")
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(arm|aarch64)")
    set(KEEL_NATIVE_FLAGS $<$<COMPILE_LANGUAGE:CXX>:-mcpu=native>)
else()
    set(KEEL_NATIVE_FLAGS $<$<COMPILE_LANGUAGE:CXX>:-march=native>)
endif()
