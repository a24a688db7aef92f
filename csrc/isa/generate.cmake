# From list.cmake: for each ISA and family of kernels a source file that includes isa/ISA.h and then FAMILY/kernel.h,
# one more for each FAMILY/kernel*.h beside it (what is better compiled by itself), and the header isa/list.h for the
# registry. The families are those of MPREC_FAMILIES, the architecture is MPREC_ARCH.
set(MPREC_GENERATED ${CMAKE_BINARY_DIR}/generated)
set(MPREC_ISA_SOURCES)
set(isas)
set(isa_entries)
set(table_entries)

function(mprec_isa name)
  cmake_parse_arguments(PARSE_ARGV 1 isa "" "BASE;ARCH;LENT" "CPU;FLAGS;FOR")
  if((isa_ARCH AND NOT isa_ARCH STREQUAL MPREC_ARCH) OR (isa_BASE AND NOT isa_BASE IN_LIST isas))
    return()
  endif()
  set(isas ${isas} ${name} PARENT_SCOPE)
  set(flags ${flags_${isa_BASE}} ${isa_FLAGS})
  set(needs ${needs_${isa_BASE}} ${isa_CPU})
  set(kernels)
  foreach(family IN LISTS MPREC_FAMILIES)
    set(from ${${family}_of_${isa_BASE}})
    if(isa_FOR STREQUAL "all" OR family IN_LIST isa_FOR)
      set(from ${name})
      file(GLOB headers CONFIGURE_DEPENDS RELATIVE ${CMAKE_SOURCE_DIR}/csrc csrc/${family}/kernel*.h)
      foreach(header IN LISTS headers)
        string(REGEX REPLACE "/kernel(.*)\\.h$" "\\1" part ${header})
        set(source ${MPREC_GENERATED}/kernels/${part}_${name}.cpp)
        file(CONFIGURE OUTPUT ${source} CONTENT "#include \"isa/${name}.h\"\n//\n#include \"${header}\"\n")
        set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS "${flags}")
        list(APPEND MPREC_ISA_SOURCES ${source})
      endforeach()
    endif()
    set(${family}_of_${name} ${from} PARENT_SCOPE)
    string(APPEND kernels ", ${from}")
  endforeach()
  list(TRANSFORM needs REPLACE "(.+)" "__builtin_cpu_supports(\"\\1\")" OUTPUT_VARIABLE supports)
  if(supports) # libgcc's test covers the operating system's saved-state bits (XCR0) too
    list(JOIN supports " && " condition)
    set(condition "(__builtin_cpu_init(), ${condition})")
  else()
    set(condition true)
  endif()
  if(isa_LENT)
    string(APPEND condition " && ${isa_LENT}()")
  endif()
  set(flags_${name} ${flags} PARENT_SCOPE)
  set(needs_${name} ${needs} PARENT_SCOPE)
  set(MPREC_ISA_SOURCES ${MPREC_ISA_SOURCES} PARENT_SCOPE)
  set(isa_entries "${isa_entries} \\\n  X(${name}, ${condition})" PARENT_SCOPE)
  set(table_entries "${table_entries} \\\n  X(${name}${kernels})" PARENT_SCOPE)
endfunction()

include(${CMAKE_CURRENT_LIST_DIR}/list.cmake)
string(REPLACE ";" ", " families "${MPREC_FAMILIES}")
file(CONFIGURE OUTPUT ${MPREC_GENERATED}/isa/list.h @ONLY CONTENT
"// Made by CMake from csrc/isa/list.cmake.
#pragma once
// X(ISA, whether this CPU can run it), slowest first.
#define MPREC_ISAS(X)@isa_entries@
// X(ISA, the ISA whose kernels serve it, for each of: @families@).
#define MPREC_KERNEL_TABLES(X)@table_entries@
")
