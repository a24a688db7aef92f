// Loaded ahead of bochscpu's native module, with its symbols global, so that the module binds to these.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

// The module always builds a Cannon Lake; make that the model whose factory BOCHS_CPU_FACTORY names.
void* _Z23create_corei3_cnl_cpuidP8BX_CPU_C(void* cpu) {
  void* (*factory)(void*) = (void* (*)(void*))dlsym(RTLD_DEFAULT, getenv("BOCHS_CPU_FACTORY"));
  if (!factory) abort();
  return factory(cpu);
}

// Two symbols of glibc 2.38, for older systems.
unsigned long long __isoc23_strtoull(const char* text, char** end, int base) {
  return (strtoull)(text, end, base);
}
int __isoc23_sscanf(const char* text, const char* format, ...) {
  va_list args;
  va_start(args, format);
  const int matched = (vsscanf)(text, format, args);
  va_end(args);
  return matched;
}
