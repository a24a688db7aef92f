// The engine, which keeps the queries' futures for Python until each has its outcome.
//
// Calls that wait release the interpreter's lock; all others keep it, and wait at most for the few
// microseconds that a thread of the engine holds the engine's own lock, under which nothing of Python is
// touched.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <cmath>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "python/arguments.h"
#include "python/bags.h"
#include "python/path_program.h"
#include "python/tables.h"
#include "python/tensor.h"
#include "serving/engine.h"

namespace py = pybind11;

namespace mprec::python {
namespace {

using namespace serving;
using scheduler::Scheduler;

constexpr double look_at_weights_s = 1e-3;
constexpr int64_t looked_at_for_samples = 400;  // see Share: a twentieth of the weights' bytes is read

double monotonic() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double>(now).count();
}

Engine::Clock clock_of(const py::object& clock) {
  if (clock.is_none()) return monotonic;
  // Never let go of but with the interpreter's lock.
  const std::shared_ptr<py::object> shared(new py::object(clock), [](py::object* o) {
    const py::gil_scoped_acquire acquire;
    delete o;
  });
  return [shared] {
    const py::gil_scoped_acquire acquire;
    return (*shared)().cast<double>();
  };
}

struct PyJob {
  std::shared_ptr<scheduler::Job> job;
};

class PyEngine {
 public:
  PyEngine(std::vector<std::shared_ptr<Lane>> lanes, int64_t max_batch, int64_t max_queue, bool admission,
           double late_share, const py::object& clock, int64_t features, int64_t num_dense, py::object check)
      : engine_(lanes, {max_batch, max_queue, admission, late_share}, clock_of(clock)),
        check_(std::move(check)),
        features_(features),
        num_dense_(num_dense) {
    hold(lanes);
  }
  ~PyEngine() {
    for (const auto& query : engine_.clear()) release(*query);
    for (const auto& outcome : engine_.outcomes(false)) release(*outcome.query);
  }

  // The query, or (reason, message).
  py::object submit(const py::object& future, const py::object& batch, double sla,
                    std::optional<double> arrived) {
    const int64_t size = samples(batch);
    std::optional<Batch> plain = take(batch, size);
    if (!plain) check_(batch, features_, num_dense_);
    look_at_weights();
    auto [query, refusal] = engine_.submit(size, sla, arrived, plain, future.ptr());
    if (refusal) return py::make_tuple(refusal->reason, refusal->message);
    future.inc_ref();  // released with its outcome
    return py::cast(query);
  }

  // [(late_s, due_s, finished_s, refused, failed, scores, {path: samples}, message)] of each query: see
  // Engine::replay. The future of one that failed gets the error.
  py::list replay(const py::list& futures, const std::vector<double>& at, double sla) {
    Load load;
    for (size_t i = 0; i < at.size(); ++i) load.entries.push_back(entry(futures[i], at[i]));
    looked_ = 0;
    look_at_weights();
    interruptible([&](const auto& stop) { engine_.replay(load, sla, stop); });
    py::list all(load.results.size());
    for (size_t i = 0; i < load.results.size(); ++i) all[i] = told(load.results[i]);
    return all;
  }

  // The same of one query that is due now: see Engine::answer.
  py::tuple answer(const py::object& future, double sla, std::optional<double> arrived) {
    Load load;
    load.entries.push_back(entry(future, 0));
    look_at_weights();
    interruptible([&](const auto& stop) { engine_.answer(load, sla, arrived, stop); });
    return told(load.results[0]);
  }

  bool cancel(Query& query) {
    const bool first = engine_.cancel(query);
    if (first && !query.orphan) release(query);
    return first;
  }

  // [(future, scores, {path: samples}, arrived, finished)]; scores are None of queries that expired. None,
  // not an empty list, where there will be no more: queries that were cancelled have outcomes that nobody is
  // told.
  std::optional<py::list> outcomes(bool wait) {
    std::vector<Engine::Outcome> found;
    {
      const py::gil_scoped_release release;
      found = engine_.outcomes(wait);
    }
    if (found.empty() && wait) return std::nullopt;
    py::list all;
    for (const auto& [query, kind, arrived, finished] : found) {
      const auto future = py::reinterpret_steal<py::object>(static_cast<PyObject*>(query->client));
      if (kind == Engine::Outcome::done_with) continue;
      const auto [scores, paths] = scores_of(kind == Engine::Outcome::answered ? query.get() : nullptr);
      all.append(py::make_tuple(future, scores, paths, arrived, finished));
    }
    return all;
  }

  std::optional<PyJob> take_job(size_t index, int threads) {
    const py::gil_scoped_release release;
    auto job = engine_.take(index, threads);
    return job ? std::make_optional(PyJob{std::move(job)}) : std::nullopt;
  }

  std::pair<std::optional<PyJob>, bool> poll(size_t index) {
    bool expired = false;
    auto job = engine_.poll(index, expired);
    return {job ? std::make_optional(PyJob{std::move(job)}) : std::nullopt, expired};
  }

  // [(future, query, start, stop)] of the pieces that are still wanted.
  py::list wanted(const PyJob& job) {
    const auto pieces = engine_.wanted(*job.job);
    py::list all(pieces.size());
    for (size_t i = 0; i < pieces.size(); ++i) {
      const auto query = std::static_pointer_cast<Query>(pieces[i].ticket);
      all[i] = py::make_tuple(client(*query), query, pieces[i].start, pieces[i].stop);
    }
    return all;
  }

  bool score(const std::shared_ptr<Query>& query, int64_t start, int64_t stop, const std::string& path,
             const py::object& scores) {
    const Tensor t = view(scores.ptr(), "scores", DType::f32, 1);
    if (start < 0 || start > stop || stop > query->size || t.shape[0] != stop - start)
      throw py::value_error("scores: expected one for each sample of the piece");
    return engine_.score({query, start, stop}, path, t.ptr<float>());
  }

  // True if this settles the query: its future is then the caller's.
  bool fail(const std::shared_ptr<Query>& query) {
    const bool first = engine_.fail(query);
    if (first && !query->load && !query->orphan) release(*query);
    return first;
  }

  // Futures of the queries that waited.
  py::list clear() {
    py::list futures;
    for (const auto& query : engine_.clear()) {
      futures.append(client(*query));
      if (!query->orphan) release(*query);
    }
    return futures;
  }

  void replace(std::vector<std::shared_ptr<Lane>> lanes, int64_t features, int64_t num_dense) {
    engine_.replace(lanes);
    if (features > 0) features_ = features, num_dense_ = num_dense;
    auto before = std::move(programs_);
    hold(lanes);
    for (auto& executor : before)
      for (py::object& program : executor) let_go(std::move(program));
  }

  // The program of a path; None: it has none.
  void set_program(size_t index, const std::string& path, const py::object& program) {
    size_t option = 0;
    engine_.read([&](const Scheduler& s, const auto&, double) {
      option = s.lanes().at(index)->option(path);
      return 0;
    });
    py::object& held = programs_.at(index).at(option);
    const Program* native = nullptr;
    if (!program.is_none()) {
      const auto& found = program.cast<const PathProgram&>();
      if (features_ < 0) features_ = found.num_features, num_dense_ = found.num_dense;
      if (found.num_features == features_ && found.num_dense == num_dense_) native = &*found.program;
    }
    engine_.set_program(index, option, native);
    if (!held.is(program)) {
      py::object before = std::exchange(held, program);
      let_go(std::move(before));
    }
  }

  py::dict statistics() {
    return engine_.read([&](const Scheduler& s, const Engine::Counts& c, double now) {
      py::dict d;
      d["queries"] = c.queries;
      d["answered"] = c.answered;
      d["late"] = c.late;
      d["failed"] = c.failed;
      d["cancelled"] = c.cancelled;
      d["batches"] = c.batches;
      d["refused"] = c.refused;
      d["samples"] = c.samples;
      d["waiting_samples"] = s.queue().waiting();
      d["waiting_queries"] = s.queue().size();
      py::list executors;
      for (size_t i = 0; i < s.lanes().size(); ++i) {
        const Lane& lane = *s.lanes()[i];
        const auto& e = c.executors[i];
        py::dict factors, served;
        for (size_t o = 0; o < lane.options.size(); ++o) {
          factors[lane.options[o].path.c_str()] = lane.correction->factors()[o];
          served[lane.options[o].path.c_str()] = e.served[o];
        }
        executors.append(py::dict(py::arg("batches") = e.batches, py::arg("busy_s") = e.busy_s,
                                  py::arg("corrections") = factors, py::arg("served") = served));
      }
      d["executors"] = executors;
      d["query_s"] = s.query_s;
      d["last_answer_s"] =
          std::isinf(c.last_answer) ? py::object(py::none()) : py::float_(now - c.last_answer);
      return d;
    });
  }

  Engine& engine() { return engine_; }

 private:
  Load::Entry entry(const py::object& future, double at) const {
    const py::object batch = future.attr("batch");
    const int64_t size = samples(batch);
    const auto plain = take(batch, size);
    if (!plain) check_(batch, features_, num_dense_);
    return {size, at, plain, future.ptr()};
  }

  // Runs f(stop) without the interpreter's lock; an interrupt stops it.
  template <class F>
  static void interruptible(const F& f) {
    bool interrupted = false;
    {
      const py::gil_scoped_release release;
      f([&] {
        const py::gil_scoped_acquire acquire;
        if (!interrupted) interrupted = PyErr_CheckSignals() != 0;
        return interrupted;
      });
    }
    if (interrupted) throw py::error_already_set();
  }

  static py::tuple told(const Load::Result& r) {
    const auto [scores, paths] = scores_of(r.kind == Load::Result::answered ? r.query.get() : nullptr);
    return py::make_tuple(r.late, r.due, r.finished, r.reason, r.kind == Load::Result::failed, scores, paths,
                          r.message);
  }

  // Of a query that is answered; null: it is not.
  static std::pair<py::object, py::dict> scores_of(const Query* query) {
    py::dict paths;
    if (!query) return {py::none(), paths};
    py::object scores = new_tensor({query->size}, DType::f32);
    std::copy(query->scores.begin(), query->scores.end(),
              view(scores.ptr(), "scores", DType::f32, 1).ptr<float>());
    for (const auto& [path, count] : query->paths) paths[path.c_str()] = count;
    return {std::move(scores), paths};
  }
  static py::object client(const Query& query) {
    return py::reinterpret_borrow<py::object>(static_cast<PyObject*>(query.client));
  }
  static void release(const Query& query) { Py_DECREF(static_cast<PyObject*>(query.client)); }

  static int64_t samples(const py::object& batch) {
    const Py_ssize_t size = PyObject_Size(batch.ptr());
    if (size < 0) throw py::error_already_set();
    return size;
  }

  // A batch in the form that programs take; none if it has another.
  std::optional<Batch> take(const py::object& batch, int64_t size) const {
    if (features_ < 0 || size < 1) return std::nullopt;
    try {
      const Tensor dense = float_matrix(batch.attr("dense").ptr(), "dense");
      Bags bags = read_bags(batch.attr("indices").ptr(), batch.attr("offsets").ptr());
      bags.num_features = features_;
      bags.batch = size;
      if (dense.shape[0] != size || dense.shape[1] != num_dense_ || bags.offsets.size != bags.num_bags() + 1)
        return std::nullopt;
      return Batch{dense.ptr<float>(), dense.strides[0], bags};
    } catch (const NotTaken&) {
      return std::nullopt;
    }
  }

  void hold(const std::vector<std::shared_ptr<Lane>>& lanes) {
    programs_.clear();
    for (const auto& lane : lanes) programs_.emplace_back(lane->options.size(), py::none());
  }

  // Once no thread runs it any more.
  void let_go(py::object program) {
    if (program.is_none()) return;
    const Program* const native = &*program.cast<const PathProgram&>().program;
    const py::gil_scoped_release release;
    while (engine_.uses(native)) std::this_thread::sleep_for(std::chrono::microseconds(100));
  }

  // A program whose weights have changed serves no longer: the path is asked in Python, which packs them
  // again. One program each millisecond, so that this costs little; after a silence, all of them.
  void look_at_weights() {
    const double now = monotonic();
    double due = (now - looked_) / look_at_weights_s;
    if (due < 1) return;
    looked_ = now;
    size_t count = 0;
    for (const auto& executor : programs_) count += executor.size();
    for (size_t n = 0; n < count && due >= 1; ++n, --due) {
      next_ = (next_ + 1) % count;
      size_t i = 0, o = next_;
      while (o >= programs_[i].size()) o -= programs_[i++].size();
      const py::object& program = programs_[i][o];
      if (!program.is_none() && program.cast<const PathProgram&>().changed(looked_at_for_samples))
        engine_.set_program(i, o, nullptr);
    }
  }

  Engine engine_;
  py::object check_;
  int64_t features_, num_dense_;                   // that the paths take; -1: not known
  std::vector<std::vector<py::object>> programs_;  // by executor and option
  double looked_ = 0;
  size_t next_ = 0;  // program to be looked at
};

}  // namespace

void bind_engine(py::module_& m) {
  py::class_<Query, std::shared_ptr<Query>>(m, "EngineQuery", "A query that an engine has taken.")
      .def_property_readonly("size", [](const Query& q) { return q.size; });
  py::class_<PyJob>(m, "EngineJob", "A batch that an engine's own threads could not score.")
      .def_property_readonly("path", [](const PyJob& j) { return j.job->lane->options[j.job->option].path; })
      .def_property_readonly("pieces", [](const PyJob& j) { return j.job->pieces.size(); });
  py::class_<PyEngine>(m, "Engine", "See csrc/serving/engine.h.")
      .def(py::init<std::vector<std::shared_ptr<Lane>>, int64_t, int64_t, bool, double, const py::object&,
                    int64_t, int64_t, py::object>(),
           py::arg("lanes"), py::kw_only(), py::arg("max_batch"), py::arg("max_queue"), py::arg("admission"),
           py::arg("late_share"), py::arg("clock"), py::arg("features"), py::arg("num_dense"),
           py::arg("check"))
      .def("submit", &PyEngine::submit, py::arg("future"), py::arg("batch"), py::arg("sla_s"),
           py::arg("arrived_s"))
      .def("replay", &PyEngine::replay, py::arg("futures"), py::arg("at_s"), py::arg("sla_s"))
      .def("answer", &PyEngine::answer, py::arg("future"), py::arg("sla_s"), py::arg("arrived_s"))
      .def("cancel", &PyEngine::cancel, py::arg("query"))
      .def("outcomes", &PyEngine::outcomes, py::arg("wait"))
      .def("start", [](PyEngine& e) { e.engine().start(); })
      .def("take", &PyEngine::take_job, py::arg("index"), py::arg("threads"))
      .def("poll", &PyEngine::poll, py::arg("index"))
      .def("wanted", &PyEngine::wanted, py::arg("job"))
      .def("score", &PyEngine::score, py::arg("query"), py::arg("start"), py::arg("stop"), py::arg("path"),
           py::arg("scores"))
      .def("fail", &PyEngine::fail, py::arg("query"))
      .def(
          "done",
          [](PyEngine& e, const PyJob& job, double seconds, double rest_s) {
            e.engine().done(*job.job, seconds, rest_s);
          },
          py::arg("job"), py::arg("seconds"), py::arg("rest_s") = 0.0)
      .def(
          "again", [](PyEngine& e, std::shared_ptr<Query> query) { e.engine().again(std::move(query)); },
          py::arg("query"))
      .def(
          "rest", [](PyEngine& e, size_t index, double rest_s) { e.engine().rest(index, rest_s); },
          py::arg("index"), py::arg("rest_s"))
      .def("close", [](PyEngine& e) { e.engine().close(); })
      .def("clear", &PyEngine::clear)
      .def("stop", [](PyEngine& e) { e.engine().stop(); })
      .def("replace", &PyEngine::replace, py::arg("lanes"), py::arg("features"), py::arg("num_dense"))
      .def("set_program", &PyEngine::set_program, py::arg("index"), py::arg("path"), py::arg("program"))
      .def(
          "uses",
          [](PyEngine& e, size_t index, const std::shared_ptr<Lane>& lane) {
            return e.engine().uses(index, lane.get());
          },
          py::arg("index"), py::arg("lane"))
      .def("statistics", &PyEngine::statistics);
}

}  // namespace mprec::python
