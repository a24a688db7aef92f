// The scheduler and its parts, as mprec.dispatch shows them. Each call takes microseconds, so the
// interpreter's lock is kept; it is also what guards the objects that queries carry.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <structseq.h>

#include <initializer_list>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "common/error.h"
#include "scheduler/scheduler.h"

namespace py = pybind11;

namespace mprec::python {
namespace {

using namespace scheduler;

struct Query : Ticket {
  Query(int64_t size, double deadline, py::object item) : Ticket(size, deadline), item(std::move(item)) {}
  py::object item;
};

py::object query_of(const std::shared_ptr<Ticket>& ticket) {
  return py::cast(std::static_pointer_cast<Query>(ticket));
}

// A correction that calls its paths by name.
struct Named {
  explicit Named(std::vector<std::string> paths)
      : names(std::move(paths)), correction(std::make_shared<Correction>(names.size())) {
    if (names.empty()) throw py::value_error("names: expected at least one");
  }
  explicit Named(const Lane& lane) : correction(lane.correction) {
    for (const Option& option : lane.options) names.push_back(option.path);
  }
  size_t path(const std::string& name) const {
    for (size_t i = 0; i < names.size(); ++i)
      if (names[i] == name) return i;
    throw py::key_error(name);
  }
  py::dict factors() const {
    py::dict all;
    for (size_t i = 0; i < names.size(); ++i) all[names[i].c_str()] = correction->factors()[i];
    return all;
  }

  std::vector<std::string> names;
  std::shared_ptr<Correction> correction;
};

// Named tuples: they are made for every query and batch.
PyTypeObject* named_tuple(py::module_& m, const char* name, const char* doc,
                          std::vector<PyStructSequence_Field> fields) {
  const int count = static_cast<int>(fields.size());
  fields.push_back({nullptr, nullptr});
  PyStructSequence_Desc description{name, doc, fields.data(), count};
  PyTypeObject* const type = PyStructSequence_NewType(&description);
  if (!type) throw py::error_already_set();
  m.add_object(std::string(name).substr(std::string(name).rfind('.') + 1).c_str(),
               reinterpret_cast<PyObject*>(type));
  return type;
}

py::object fill(PyTypeObject* type, std::initializer_list<py::object> fields) {
  auto made = py::reinterpret_steal<py::object>(PyStructSequence_New(type));
  if (!made) throw py::error_already_set();
  Py_ssize_t i = 0;
  for (const py::object& field : fields) PyStructSequence_SetItem(made.ptr(), i++, field.inc_ref().ptr());
  return made;
}

PyTypeObject *piece_type, *refusal_type;

py::list pieces_of(const Job& job) {
  py::list all(job.pieces.size());
  for (size_t i = 0; i < job.pieces.size(); ++i) {
    const Piece& piece = job.pieces[i];
    all[i] = fill(piece_type, {query_of(piece.ticket), py::int_(piece.start), py::int_(piece.stop)});
  }
  return all;
}

py::list queries_of(const std::vector<std::shared_ptr<Ticket>>& tickets) {
  py::list all(tickets.size());
  for (size_t i = 0; i < tickets.size(); ++i) all[i] = query_of(tickets[i]);
  return all;
}

FluidPrice fluid_price(const std::vector<std::vector<std::pair<double, double>>>& executors) {
  std::vector<std::vector<FluidPrice::Path>> columns;
  for (const auto& paths : executors) {
    auto& column = columns.emplace_back();
    for (const auto& [quality, tau] : paths) column.push_back({quality, tau});
  }
  return FluidPrice(std::move(columns));
}

void bind_parts(py::module_& m) {
  py::class_<Traffic>(m, "Traffic")
      .def(py::init<>())
      .def("count", &Traffic::count, py::arg("now"), py::arg("size"), py::arg("left"))
      .def("rate", &Traffic::rate, py::arg("now"))
      .def_property_readonly("dispersion", &Traffic::dispersion)
      .def_property_readonly("sla", &Traffic::sla)
      .def_property_readonly("query_size", &Traffic::query_size)
      .def_property_readonly("burst_size", &Traffic::burst_size)
      .def_property_readonly("arrivals", &Traffic::arrivals)
      .def_property_readonly("sizes", &Traffic::sizes);
  py::class_<Named>(m, "Correction")
      .def(py::init<std::vector<std::string>>(), py::arg("names"))
      .def_property_readonly("factors", &Named::factors)
      .def_property_readonly("noise", [](const Named& c) { return c.correction->noise(); })
      .def(
          "spread", [](const Named& c, double now, double calls) { return c.correction->spread(now, calls); },
          py::arg("now"), py::arg("calls") = 1.0)
      .def(
          "observe",
          [](Named& c, const std::string& name, double ratio, double now, double seconds) {
            c.correction->observe(c.path(name), ratio, now, seconds);
          },
          py::arg("name"), py::arg("ratio"), py::arg("now"), py::arg("seconds") = 0.0);
  py::class_<FluidPrice>(m, "FluidPrice")
      .def(py::init(&fluid_price), py::arg("executors"))
      .def_property_readonly("best", &FluidPrice::best)
      .def_property_readonly("goodput", &FluidPrice::goodput)
      .def_property_readonly("capacity", &FluidPrice::capacity)
      .def("sample", &FluidPrice::sample, py::arg("rate"))
      .def("second", &FluidPrice::second, py::arg("executor"), py::arg("value"))
      .def("quality_per_second", &FluidPrice::quality_per_second, py::arg("rate"));
  py::class_<Overflow>(m, "Overflow")
      .def(py::init<double, double, double>(), py::arg("load"), py::arg("grain"), py::arg("bound"))
      .def("lost", &Overflow::lost, py::arg("backlog"), py::arg("more"));
  py::class_<Latest>(m, "Latest")
      .def(py::init<const std::vector<double>&, const std::vector<int64_t>&, double, double>(),
           py::arg("seconds"), py::arg("sizes"), py::arg("sla"), py::arg("spread"))
      .def("missed", &Latest::missed, py::arg("seconds"));
}

void bind_values(py::module_& m) {
  piece_type = named_tuple(m, "mprec.dispatch.scheduler.Piece", "Samples ``start`` to ``stop`` of a query.",
                           {{"ticket", nullptr}, {"start", nullptr}, {"stop", nullptr}});
  refusal_type =
      named_tuple(m, "mprec.dispatch.scheduler.Refusal",
                  "Why a query is not taken: ``full``, ``overload`` or ``unsupported``, with a sentence.",
                  {{"reason", nullptr}, {"message", nullptr}});
  py::class_<Option>(m, "Option")
      .def(py::init<std::string, double, std::vector<double>>(), py::arg("path"), py::arg("quality"),
           py::arg("seconds"))
      .def_readonly("path", &Option::path)
      .def_readonly("quality", &Option::quality)
      .def_readonly("seconds", &Option::seconds);
  py::class_<Lane, std::shared_ptr<Lane>>(m, "Lane")
      .def(py::init<std::string, std::vector<Option>>(), py::arg("name"), py::arg("options"))
      .def_readonly("name", &Lane::name)
      .def_readonly("options", &Lane::options)
      .def_readonly("busy", &Lane::busy)
      .def_readonly("until", &Lane::until)
      .def_property_readonly("correction", [](const Lane& lane) { return Named(lane); });
  py::class_<Query, std::shared_ptr<Query>>(m, "Ticket")
      .def_property_readonly("size", [](const Query& q) { return q.size; })
      .def_property_readonly("deadline", [](const Query& q) { return q.deadline; })
      .def_property_readonly("taken", [](const Query& q) { return q.taken; })
      .def_readonly("item", &Query::item);
  py::class_<Job, std::shared_ptr<Job>>(m, "Job")
      .def_readonly("index", &Job::index)
      .def_readonly("lane", &Job::lane)
      .def_property_readonly("path", [](const Job& job) { return job.lane->options[job.option].path; })
      .def_property_readonly("pieces", &pieces_of)
      .def_readonly("samples", &Job::samples)
      .def_readonly("predicted_s", &Job::predicted_s)
      .def_readonly("profiled_s", &Job::profiled_s)
      .def_readonly("started", &Job::started);
}

}  // namespace

void bind_scheduler(py::module_& m) {
  bind_parts(m);
  bind_values(m);
  py::class_<Scheduler>(m, "Scheduler")
      .def(py::init([](std::vector<std::shared_ptr<Lane>> lanes, int64_t max_batch, int64_t max_queue,
                       bool admission, double late_share) {
             return Scheduler(std::move(lanes), {max_batch, max_queue, admission, late_share});
           }),
           py::arg("lanes"), py::kw_only(), py::arg("max_batch") = Scheduler::Limits{}.max_batch,
           py::arg("max_queue") = Scheduler::Limits{}.max_queue, py::arg("admission") = true,
           py::arg("late_share") = Scheduler::Limits{}.late_share)
      .def("__len__", [](const Scheduler& s) { return s.queue().size(); })
      .def_property_readonly("waiting", [](const Scheduler& s) { return s.queue().waiting(); })
      .def_property_readonly("lanes", &Scheduler::lanes)
      .def_property_readonly("idle",
                             [](const Scheduler& s) {
                               for (const auto& lane : s.lanes())
                                 if (!lane->busy) return true;
                               return false;
                             })
      .def_readwrite("query_s", &Scheduler::query_s)
      .def(
          "offer",
          [](Scheduler& s, double now, int64_t size, double deadline, py::object item) {
            auto query = std::make_shared<Query>(size, deadline, std::move(item));
            const auto refusal = s.offer(now, query);
            return refusal ? fill(refusal_type, {py::str(refusal->reason), py::str(refusal->message)})
                           : py::cast(query);
          },
          py::arg("now"), py::arg("size"), py::arg("deadline"), py::arg("item") = py::none())
      .def(
          "withdraw", [](Scheduler& s, const Query& ticket) { return s.withdraw(ticket); }, py::arg("ticket"))
      .def(
          "again", [](Scheduler& s, std::shared_ptr<Query> ticket) { s.again(std::move(ticket)); },
          py::arg("ticket"))
      .def("rest", &Scheduler::rest, py::arg("index"), py::arg("now"), py::arg("rest_s"))
      .def("clear", [](Scheduler& s) { return queries_of(s.clear()); })
      .def(
          "expire", [](Scheduler& s, double now) { return queries_of(s.expire(now)); }, py::arg("now"))
      .def("next", &Scheduler::next, py::arg("now"))
      .def("done", &Scheduler::done, py::arg("job"), py::arg("now"), py::arg("seconds"))
      .def("failed", &Scheduler::failed, py::arg("job"), py::arg("now"), py::arg("rest_s") = 0.0)
      .def("replace", &Scheduler::replace, py::arg("lanes"));
}

}  // namespace mprec::python
