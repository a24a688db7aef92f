#include <pybind11/pybind11.h>

#include <memory>
#include <utility>
#include <vector>

#include "bags/served.h"
#include "embedding_bag/embedding_bag.h"
#include "python/arguments.h"
#include "python/bags.h"
#include "python/output.h"
#include "python/table_group.h"
#include "python/tables.h"
#include "python/tensor.h"

namespace py = pybind11;

namespace mprec::python {
namespace {

// Below this cost (cache lines) a call is over sooner than another thread could make use of the GIL.
constexpr int64_t release_gil_cost = 2048;

void run(const PoolingRequest& request, int threads) {
  without_gil(embedding_bag_cost(request) >= release_gil_cost,
              [&] { embedding_bag_forward(request, threads); });
}

// Of a new result: the tables' type, float32 of quantised ones.
DType result_type(const Tensor& table) { return table.dtype == DType::u8 ? DType::f32 : table.dtype; }

constexpr Signature<10> single{"embedding_bag",
                               {"weight", "indices", "offsets", "per_sample_weights", "mode",
                                "include_last_offset", "padding_idx", "out", "threads", "bits"},
                               9};

py::object embedding_bag(const Arguments<10>& a) {
  const Tensor weight = matrix(a[0], "weight", Sign::remember);
  PooledTable tables[2] = {table(weight, "weight", a[9]), {}};
  Bags bags = read_bags(a[1], a[2]);
  set_features(bags, 1, flag(a[5]));
  set_pooling(bags, a[4], a[3], a[6]);
  const Output out(a[7], bags.batch, tables[0].dim, result_type(weight));
  out.check_apart_from(bags, &weight, 1);
  out.place_columns(tables[0], 0);
  tables[1].first_bag = bags.batch;
  run({bags, tables}, checked_threads(a[8]));
  return out.written();
}

// Where results go: table t's to columns[t] of `out` and on, or side by side.
void place(std::vector<PooledTable>& tables, const Bags& bags, const Output& out, const int64_t* columns) {
  std::vector<Columns> blocks;
  int64_t column = 0;
  const size_t count = tables.size() - 1;
  for (size_t t = 0; t < count; ++t) {
    tables[t].first_bag = bags.first_bag(t);
    if (columns) column = columns[t];
    const Columns taken = out.place_columns(tables[t], column);
    if (columns) blocks.push_back(taken);
    column = taken.second;
  }
  tables[count].first_bag = bags.num_bags();
  check_apart(std::move(blocks), "out_columns");
}

int64_t width_of(const std::vector<PooledTable>& tables) {
  int64_t width = 0;
  for (const PooledTable& t : tables) width += t.dim;
  return width;
}

constexpr Signature<7> grouped{
    "try_pool_tables", {"group", "modules", "indices", "offsets", "per_sample_weights", "out", "threads"}};

py::object pool_tables(const Arguments<7>& a) {
  auto& group = instance<TableGroup>(a[0], "group", "TableGroup");
  Bags whole = read_bags(a[2], a[3]);
  if (whole.offsets.size < 1 || (whole.offsets.size - 1) % group.num_features() != 0)
    throw NotTaken(NotTaken::value, message("offsets: expected 1 + a multiple of ", group.num_features(),
                                            ", got ", whole.offsets.size));
  set_features(whole, group.num_features());
  set_pooling(whole, group.mode(), a[4]);
  const ServedBags bags(whole, group.features());
  ReadTables tables = group.read(a[1]);
  const Output out(a[5], bags->batch, width_of(tables.pooled), result_type(tables.views[0]));
  out.check_apart_from(whole, tables.views.data(), tables.views.size());
  place(tables.pooled, *bags, out, group.columns());
  bags.run([&] { run({*bags, tables.pooled.data()}, checked_threads(a[6])); },
           [&](size_t t) { return tables.pooled[t].num_rows; });
  return out.written();
}

constexpr Signature<13> multi{
    "embedding_bag_multi",
    {"weights", "indices", "offsets", "per_sample_weights", "mode", "padding_idx", "out", "out_columns",
     "threads", "bits", "batch_sizes", "features", "num_features"},
    9};

py::object embedding_bag_multi(const Arguments<13>& a) {
  const List weights(a[0], "weights");
  const Py_ssize_t count = weights.size();
  const List columns(a[7], "out_columns", count), bits(a[9], "bits", count),
      batch_sizes(a[10], "batch_sizes", count), named(a[11], "features", count);
  if (batch_sizes && (columns || named)) throw py::value_error("out_columns, features: not with batch_sizes");

  Bags whole = read_bags(a[1], a[2]);
  std::vector<int64_t> first_bags;
  if (batch_sizes) {
    first_bags.push_back(0);
    for (Py_ssize_t t = 0; t < count; ++t)
      first_bags.push_back(first_bags[t] + batch_sizes.up_to(whole.offsets.size, t));
    if (whole.offsets.size != first_bags[count] + 1)
      throw OffsetsError(message("offsets: expected 1 + the number of bags, ", first_bags[count], ", got ",
                                 whole.offsets.size));
    whole.num_features = count;
    whole.first_bags = first_bags.data();
  } else {
    set_features(whole, named ? integer(a[12], "num_features") : count);
  }
  set_pooling(whole, a[4], a[3], count == 1 ? a[5] : Py_None);
  const ServedBags bags(whole, features_of(named, whole.num_features));

  std::vector<PooledTable> tables;
  std::vector<Tensor> views;
  tables.reserve(count + 1);
  views.reserve(count);
  for (Py_ssize_t t = 0; t < count; ++t) {
    views.push_back(matrix(weights[t], "weights", Sign::remember));
    tables.push_back(table(views.back(), "weights", bits[t]));
  }
  tables.emplace_back();
  const Output out(a[6], bags->batch, width_of(tables), result_type(views[0]),
                   static_cast<bool>(batch_sizes));
  out.check_apart_from(whole, views.data(), views.size());
  if (batch_sizes) {
    int64_t element = 0;
    for (Py_ssize_t t = 0; t < count; ++t) {
      tables[t].first_bag = first_bags[t];
      const int64_t batch = first_bags[t + 1] - first_bags[t];
      out.place_block(tables[t], batch, element);
      element += batch * tables[t].dim;
    }
    tables[count].first_bag = first_bags[count];
  } else {
    std::vector<int64_t> first_columns;
    for (Py_ssize_t t = 0; columns && t < count; ++t) first_columns.push_back(columns.up_to(out.width(), t));
    place(tables, *bags, out, columns ? first_columns.data() : nullptr);
  }
  bags.run([&] { run({*bags, tables.data()}, checked_threads(a[8])); },
           [&](size_t t) { return tables[t].num_rows; });
  return out.written();
}

constexpr const char multi_doc[] =
    "embedding_bag_multi(weights, indices, offsets, per_sample_weights, mode, padding_idx, out, out_columns, "
    "threads,\n                    bits=None, batch_sizes=None, features=None, num_features=None)\n\n"
    "Pools every table's bags into its columns of out [B, total] (None: a new tensor), which is returned. "
    "bits: 8 or 4 for each uint8 table. batch_sizes: bags of each table, if they differ; out is "
    "one-dimensional then, the tables' [B_t, D_t] one after another. features: which of the batch's "
    "num_features features each table serves (None: all, in order). try_...: None for tensors in a form "
    "that this does not take.";
constexpr const char single_doc[] =
    "embedding_bag(weight, indices, offsets, per_sample_weights, mode, include_last_offset, padding_idx, "
    "out, "
    "threads,\n              bits=None)\n\n"
    "Pools one table's bags into out [B, D] (None: a new tensor), which is returned. try_...: None for "
    "tensors in a form that this does not take.";

constexpr const char grouped_doc[] =
    "try_pool_tables(group, modules, indices, offsets, per_sample_weights, out, threads)\n\n"
    "Pools the bags of the group's tables, which are looked for in the dict of modules, into its columns of "
    "out [B, total] (None: a new tensor), which is returned. None for tensors in a form that this does not "
    "take, and where a table is not in its place.";

PyMethodDef methods[] = {method<multi, embedding_bag_multi>("embedding_bag_multi", multi_doc),
                         method<multi, embedding_bag_multi, false>("try_embedding_bag_multi", multi_doc),
                         method<grouped, pool_tables, false>("try_pool_tables", grouped_doc),
                         method<single, embedding_bag>("embedding_bag", single_doc),
                         method<single, embedding_bag, false>("try_embedding_bag", single_doc),
                         {}};

}  // namespace

void bind_embedding_bag(py::module_& m) {
  add_methods(m, methods);
  py::class_<TableGroup>(m, "TableGroup",
                         "Tables modules[name].owner[key] that one call pools, and where they were found.")
      .def(
          py::init([](py::tuple names, py::object owner, py::object key, py::object type, py::object bits,
                      py::object mode, py::object columns, py::object features, py::object num_features,
                      py::object module_types) {
            return std::make_unique<TableGroup>(py::make_tuple(names, owner, key, type, bits, mode, columns,
                                                               features, num_features, module_types));
          }),
          py::arg("names"), py::arg("owner"), py::arg("key"), py::arg("type"), py::arg("bits"),
          py::arg("mode"), py::arg("columns"), py::arg("features"), py::arg("num_features"),
          py::arg("module_types"),
          "bits: the module's attribute with the code of its rows' format, or None. columns: of `out`, where "
          "each table's begin (None: side by side). features: of the batch's num_features, that of each "
          "table (None: all, in order). module_types: a tuple of the types whose tables may be read.")
      .def(
          py::pickle([](const TableGroup& g) { return g.arguments(); },
                     [](py::tuple arguments) { return std::make_unique<TableGroup>(std::move(arguments)); }));
}

}  // namespace mprec::python
