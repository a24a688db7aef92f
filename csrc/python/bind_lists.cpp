// The lists of row formats and hash families, for Python.
#include <pybind11/pybind11.h>

#include "dhe/families.h"
#include "python/tensor.h"
#include "rows/formats.h"

namespace py = pybind11;

namespace mprec::python {

void bind_lists(py::module_& m) {
  m.def(
      "row_formats",
      [] {
        py::list formats;
        for (int i = 0; i < num_formats; ++i) {
          const FormatTraits& t = traits(static_cast<Format>(i));
          py::dict d;
          d["name"] = t.name;
          d["quantised"] = t.quantised;
          d["bits"] = t.bits;
          d["code"] = t.code;
          d["overhead"] = t.bytes(0);
          d["multiple"] = t.pairs ? 2 : 1;
          formats.append(d);
        }
        return formats;
      },
      "Of each format of tables' rows a dict: name; quantised (uint8 rows, with a scale); bits of a number; "
      "code, "
      "what an operator's argument `bits` says of quantised rows; overhead, bytes of a row beside its "
      "numbers; "
      "multiple, what divides the numbers in a row.");
  m.def(
      "hash_families",
      [] {
        py::list families;
        for (int i = 0; i < num_hash_families; ++i) {
          const FamilyTraits& t = traits(static_cast<HashFamily>(i));
          py::dict d;
          d["name"] = t.name;
          d["artifact"] = t.artifact;
          d["together"] = t.together;
          d["level_bits"] = t.level_bits;
          d["int8"] = t.int8_unit != 0;
          d["lut"] = t.lut_magnitude != 0;
          families.append(d);
        }
        return families;
      },
      "Of each hash family, in the order of their numbers, a dict: name; artifact (the hash modulo 1000003; "
      "else "
      "modulo 2**31 - 1); together, how many hashes are transformed together; level_bits of evenly spaced "
      "levels, "
      "or 0; int8 and lut: whether a first layer has that precision.");
}

}  // namespace mprec::python
