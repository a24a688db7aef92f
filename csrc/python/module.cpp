// The native module: what it was built with, what it runs on, and one function per operator.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/cpu.h"
#include "python/tensor.h"
#include "registry.h"

namespace py = pybind11;

namespace mprec::python {
void bind_lists(py::module_&);          // bind_lists.cpp
void bind_embedding_bag(py::module_&);  // bind_embedding_bag.cpp
void bind_gradient(py::module_&);       // bind_gradient.cpp
void bind_dhe(py::module_&);            // bind_dhe.cpp
void bind_cache(py::module_&);          // bind_cache.cpp
void bind_bags(py::module_&);           // bind_bags.cpp
void bind_modules(py::module_&);        // bind_modules.cpp
void bind_scheduler(py::module_&);      // bind_scheduler.cpp
void bind_program(py::module_&);        // bind_program.cpp
void bind_dense(py::module_&);          // bind_dense.cpp
void bind_queries(py::module_&);        // bind_queries.cpp
void bind_data(py::module_&);           // bind_data.cpp
void bind_engine(py::module_&);         // bind_engine.cpp
}  // namespace mprec::python

PYBIND11_MODULE(_C, m) {
  using namespace mprec;
  m.doc() = "Native CPU kernels of mprec. Private: use mprec.ops and mprec.nn.";
  python::register_exceptions();

  m.attr("version") = MPREC_VERSION;
  m.attr("compiler") = "g++ " __VERSION__;
  m.def("cpu_model", &cpu_model);
  m.def("isa", [] { return isa_name(kernels().isa); }, "Name of the ISA whose kernels are in use.");
  std::vector<std::string> isas, runnable_isas;
  for (Isa isa : all_isas) {
    isas.emplace_back(isa_name(isa));
    if (can_run(isa)) runnable_isas.emplace_back(isa_name(isa));
  }
  m.attr("isas") = isas;
  m.def("runnable_isas", [runnable_isas] { return runnable_isas; });
  m.def(
      "use_isa", [](const std::string& name) { use_isa(parse_isa(name)); }, py::arg("name"),
      "Switch kernels; ValueError if the CPU cannot run them.");
  python::bind_lists(m);
  python::bind_embedding_bag(m);
  python::bind_gradient(m);
  python::bind_dhe(m);
  python::bind_cache(m);
  python::bind_bags(m);
  python::bind_modules(m);
  python::bind_scheduler(m);
  python::bind_program(m);
  python::bind_dense(m);
  python::bind_queries(m);
  python::bind_data(m);
  python::bind_engine(m);
}
