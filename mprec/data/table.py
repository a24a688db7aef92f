"""One's own click log: a Parquet, CSV, TSV or Arrow file, or several, with a schema
(:mod:`mprec.data._schema`).

Read by PyArrow (``pip install 'mprec[tables]'``) in batches of rows, into files that the next run finds
(:mod:`mprec.data._cache`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mprec.data._cache import cached, default_folder, map_file
from mprec.data._schema import Schema
from mprec.data._text import find_files
from mprec.data.criteo import CACHED_FROM
from mprec.data.dataset import ClickDataset, Column
from mprec.data.vocabulary import MISSING, RawValues, Vocabulary, dump, key_of, restore
from mprec.errors import DataError

__all__ = ["SUFFIXES", "read"]

SUFFIXES = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".arrow": "ipc", ".feather": "ipc"}
ROWS_AT_ONCE = 1 << 17


def read(
    path: Path | str | Sequence[Path | str],
    *,
    schema: Path | str | None = None,
    vocabularies: Mapping[str, Vocabulary | RawValues] | None = None,
    labelled: bool = True,
    cache: bool | Path | str | None = None,
    progress: Callable[[str, float], object] | None = None,
) -> ClickDataset:
    """Read a table as a click log.

    Args:
        path: a file, a pattern, a folder (all its files of one kind), or several of these.
        schema: a JSON file; default: the table's name with ``.schema.json`` for its suffix, or
            ``schema.json`` in its folder.
        vocabularies: by feature: those of an earlier log, which a checkpoint holds.
        labelled: False for a log that is to be scored: the schema's columns for the label, the time and the
            users are not read and need not be there, all labels of the dataset are 0, and it cannot be split.
        cache: as for :func:`mprec.data.criteo.read`.
        progress: told what is being done, and which share of it is done.

    A vocabulary is learnt from the training part of the schema's split alone.

    Raises:
        DataError: no PyArrow; a file or schema that cannot be read; a column that is missing or of another
            kind than it should be; a label that is none.
    """
    files = _find(path)
    found = Schema.read(_schema_file(files, schema))
    if not labelled:
        found = replace(found, label=None, time=None, users=None, split=None)
    if vocabularies is not None and (lacking := sorted(set(found.features) - set(vocabularies))):
        raise DataError(f"vocabularies: there is none of feature {lacking[0]!r}")
    report = progress or (lambda what, share: None)
    options: dict[str, Any] = {"reader": "table", "schema": found.to_dict()}
    if vocabularies is not None:
        told, arrays = dump({name: vocabularies[name] for name in found.features})
        digest = hashlib.blake2b(json.dumps(told).encode(), digest_size=16)
        for array in arrays.values():
            digest.update(array.tobytes())
        options["known"] = digest.hexdigest()

    def build(folder: Path) -> dict[str, Any]:
        meta = _read_columns(folder, files, found, report)
        return {**meta, **_encode(folder, meta, found, vocabularies, report)}

    root = None
    if cache or (cache is None and sum(file.stat().st_size for file in files) > CACHED_FROM):
        root = default_folder() if cache in (None, True) else Path(cache)
    return cached(root, files, options, build, lambda folder, meta: _open(folder, meta, found, files))


def _find(path: Path | str | Sequence[Path | str]) -> list[Path]:
    if isinstance(path, str | Path) and Path(path).is_dir():
        for suffix in SUFFIXES:
            if next(Path(path).glob(f"*{suffix}"), None) is not None:
                return find_files(path, f"*{suffix}")
        raise DataError(f"{path}: no file in this folder ends in {', '.join(SUFFIXES)}")
    files = find_files(path, "*")
    kinds = {_format(file) for file in files}
    if len(kinds) > 1:
        raise DataError(f"{files[0]} and others: files of one kind are expected, got {sorted(kinds)}")
    return files


def _format(file: Path) -> str:
    suffixes = [suffix for suffix in file.suffixes if suffix != ".gz"]
    if not suffixes or suffixes[-1] not in SUFFIXES:
        raise DataError(f"{file}: expected a name that ends in {', '.join(SUFFIXES)}")
    return SUFFIXES[suffixes[-1]]


def _schema_file(files: Sequence[Path], schema: Path | str | None) -> Path:
    if schema is not None:
        return Path(schema)
    name = files[0].name
    while Path(name).suffix in (".gz", *SUFFIXES):
        name = Path(name).stem
    for candidate in (files[0].with_name(name + ".schema.json"), files[0].with_name("schema.json")):
        if candidate.is_file():
            return candidate
    raise DataError(
        f"{files[0]}: what its columns are is told by a schema, {name}.schema.json or schema.json beside it, "
        'or the option schema=FILE: {"label": "clicked", "features": ["user", "item"], "dense": ["age"]}'
    )


def _batches(files: Sequence[Path], columns: Sequence[str]) -> Iterator[tuple[Any, int]]:
    """(record batch of the columns, number of rows of all files or 0) of each part of the table."""
    try:
        import pyarrow as pa
        import pyarrow.csv
        import pyarrow.dataset
    except ImportError as error:
        raise DataError(f"tables are read by PyArrow: pip install 'mprec[tables]' ({error})") from error
    kind: Any = _format(files[0])
    if kind == "csv":
        tabs = ".tsv" in files[0].suffixes
        options = pa.csv.ParseOptions(delimiter="\t" if tabs else ",")
        kind = pa.dataset.CsvFileFormat(parse_options=options)
    try:
        table = pa.dataset.dataset([str(file) for file in files], format=kind)
        if lacking := [name for name in columns if name not in table.schema.names]:
            raise DataError(f"{files[0]}: no column {lacking[0]!r}; it has {', '.join(table.schema.names)}")
        rows = 0 if _format(files[0]) == "csv" else table.count_rows()
        scanner = table.scanner(columns=list(columns), batch_size=ROWS_AT_ONCE, batch_readahead=2)
        for batch in scanner.to_batches():
            if batch.num_rows:
                yield batch, rows
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{files[0]}: {error}") from error


def _read_columns(folder: Path, files: Sequence[Path], schema: Schema, report) -> dict[str, Any]:
    """The table's columns as files: ``labels``, ``dense``, ``times``, ``users``, and of feature i ``keys-i``
    and, if its rows are lists, ``lengths-i``.
    """
    names = [each.column or name for name, each in schema.features.items()]
    dense = [each.column or name for name, each in schema.dense.items()]
    wanted = [schema.label, *names, *dense, schema.time, schema.users]
    wanted = list(dict.fromkeys(name for name in wanted if name is not None))
    kinds: dict[str, str] = {}
    lists: dict[str, bool] = {}
    total = 0
    with contextlib.ExitStack() as stack:

        def stream(name: str):
            return stack.enter_context(open(folder / name, "wb"))

        labels, numbers = stream("labels"), stream("dense")
        times = stream("times") if schema.time is not None else None
        users = stream("users") if schema.users is not None else None
        keys = [stream(f"keys-{i}") for i in range(len(names))]
        lengths = [stream(f"lengths-{i}") for i in range(len(names))]
        for batch, rows in _batches(files, wanted):
            labels.write(_labels(batch, schema, total))
            block = np.zeros((batch.num_rows, len(dense)), dtype=np.float32)
            for place, (name, told) in enumerate(zip(dense, schema.dense.values(), strict=True)):
                block[:, place] = _numbers(batch.column(name), name, told.log1p)
            numbers.write(block)
            if times is not None:
                times.write(_times(batch.column(schema.time), schema.time))
            if users is not None:
                users.write(_keys(batch.column(schema.users), schema.users, kinds))
            for place, (name, told) in enumerate(zip(names, schema.features.values(), strict=True)):
                values, counts = _values(batch.column(name), told.separator)
                if lists.setdefault(name, counts is not None) != (counts is not None):
                    raise DataError(f"column {name!r} has lists in some files only")
                keys[place].write(_keys(values, name, kinds))
                if counts is not None:
                    lengths[place].write(counts)
            total += batch.num_rows
            report("reading the table", min(total / rows, 1.0) if rows else 0.0)
    if not total:
        raise DataError(f"{files[0]} has no rows")
    return {
        "rows": total,
        "kinds": [kinds.get(name, "text") for name in names],  # of a column without a value, any
        "lists": [lists[name] for name in names],
        "has_times": times is not None,
        "has_users": users is not None,
    }


def _labels(batch: Any, schema: Schema, first_row: int) -> np.ndarray:
    import pyarrow as pa
    import pyarrow.compute

    if schema.label is None:
        return np.zeros(batch.num_rows, dtype=np.float32)
    column = batch.column(schema.label)
    try:
        values = pa.compute.cast(column, pa.float64()).to_numpy(zero_copy_only=False)
    except pa.ArrowException as error:
        raise DataError(
            f"label {schema.label!r}: expected numbers or true and false, got {column.type}"
        ) from error
    good = np.isfinite(values)
    if schema.at_least is None:
        good &= (values == 0) | (values == 1)
    if not good.all():
        row = int(np.argmin(good))
        expected = "0 or 1" if schema.at_least is None else "a number"
        told = "nothing" if not column[row].is_valid else repr(column[row].as_py())
        raise DataError(f"label {schema.label!r}, row {first_row + row}: expected {expected}, found {told}")
    clicks = values if schema.at_least is None else values >= schema.at_least
    return clicks.astype(np.float32)


def _numbers(column: Any, name: str, log1p: bool) -> np.ndarray:
    import pyarrow as pa
    import pyarrow.compute

    try:
        values = pa.compute.cast(column, pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    except pa.ArrowException as error:
        raise DataError(f"dense column {name!r}: expected numbers, got {column.type}") from error
    values = np.where(np.isfinite(values), values, 0.0)
    return np.log1p(np.maximum(values, 0)) if log1p else values


def _times(column: Any, name: str) -> np.ndarray:
    import pyarrow as pa
    import pyarrow.compute

    if column.null_count:
        raise DataError(f"time {name!r}: a row has none")
    kind = column.type
    if pa.types.is_timestamp(kind) or pa.types.is_date64(kind):
        return pa.compute.cast(column, pa.int64()).to_numpy(zero_copy_only=False).astype(np.float64)
    try:
        return pa.compute.cast(column, pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    except pa.ArrowException as error:
        raise DataError(f"time {name!r}: expected numbers or timestamps, got {kind}") from error


def _values(column: Any, separator: str | None) -> tuple[Any, np.ndarray | None]:
    """(values one after another, how many of them each row has, or None: one)."""
    import pyarrow as pa
    import pyarrow.compute

    if separator is not None:
        if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
            raise DataError(f"a separator is for columns of text, got {column.type}")
        column = pa.compute.if_else(pa.compute.equal(column, ""), None, column)
        column = pa.compute.split_pattern(column, separator)
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        counts = pa.compute.fill_null(pa.compute.list_value_length(column), 0)
        return column.flatten(), counts.to_numpy(zero_copy_only=False).astype(np.int64)
    return column, None


def _keys(column: Any, name: str, kinds: dict[str, str]) -> np.ndarray:
    """int64 keys of a column of integers or text."""
    import pyarrow as pa
    import pyarrow.compute

    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_null(kind):
        return np.full(len(column), MISSING, dtype=np.int64)
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if not (text or pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
        raise DataError(f"feature column {name!r}: expected integers or text, got {kind}")
    told = "text" if text else "integer"
    if kinds.setdefault(name, told) != told:
        raise DataError(f"column {name!r} is {told} in one part of the table and {kinds[name]} in another")
    if text or pa.types.is_dictionary(column.type):
        coded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
        values = [key_of(value, told) for value in coded.dictionary.to_pylist()]
        codes = pa.compute.fill_null(coded.indices, len(values)).to_numpy(zero_copy_only=False)
        return np.array([*values, MISSING], dtype=np.int64)[codes]
    try:
        numbers = pa.compute.cast(column, pa.int64())
    except pa.ArrowException as error:
        raise DataError(f"feature column {name!r}: {error}") from error
    missing = numbers.is_null().to_numpy(zero_copy_only=False)
    values = pa.compute.fill_null(numbers, 0).to_numpy(zero_copy_only=False).astype(np.int64)
    bound = np.int64(1) << 62
    if len(values) and not (-bound <= values.min() and values.max() < bound):
        raise DataError(f"feature column {name!r}: expected integers in [-2^62, 2^62)")
    values = np.where(values < 0, values - 1, values)  # -1 is the key of what is missing
    return np.where(missing, MISSING, values)


def _encode(
    folder: Path,
    meta: dict[str, Any],
    schema: Schema,
    known: Mapping[str, Vocabulary | RawValues] | None,
    report,
) -> dict[str, Any]:
    """Files of keys become ``ids`` [rows, features without lists], ``ids-i`` and ``offsets-i``."""
    rows = meta["rows"]
    train = _bare(folder, meta, schema).parts() == 0
    encoders: dict[str, Vocabulary | RawValues] = {}
    single = []
    for place, (name, told) in enumerate(schema.features.items()):
        file = folder / f"keys-{place}"
        keys = map_file(file, np.int64, (file.stat().st_size // 8,))
        of_train = train
        if meta["lists"][place]:
            lengths = np.fromfile(folder / f"lengths-{place}", dtype=np.int64)
            np.concatenate([[0], np.cumsum(lengths)]).tofile(folder / f"offsets-{place}")
            of_train = np.repeat(train, lengths)
        kind = meta["kinds"][place]
        if known is not None:
            encoder = known[name]
            if encoder.kind != kind:
                raise DataError(f"feature {name!r}: expected {encoder.kind}, as in training, got {kind}")
        elif told.raw:
            encoder = RawValues(kind)
        else:
            options = {"min_count": told.min_count, "max_size": told.max_size, "oov": told.oov}
            encoder = Vocabulary.fit(keys[of_train], **options, kind=kind)
        try:
            ids = encoder.encode(keys)
        except ValueError as error:
            raise DataError(f"feature {name!r}: {error}") from error
        encoders[name] = encoder
        ids.tofile(folder / f"ids-{place}")
        if not meta["lists"][place]:
            single.append((place, ids.dtype))
        meta["dtypes"] = [*meta.get("dtypes", []), str(ids.dtype)]
        report("making vocabularies", (place + 1) / len(schema.features))
    dtype = np.result_type(np.int32, *(each for _, each in single))
    columns = [map_file(folder / f"ids-{place}", each, (rows,)) for place, each in single]
    with open(folder / "ids", "wb") as stream:
        for start in range(0, rows, ROWS_AT_ONCE):
            block = [column[start : start + ROWS_AT_ONCE].astype(dtype) for column in columns]
            if block:
                stream.write(np.stack(block, axis=1))
    del columns
    for place in range(len(schema.features)):
        for name in ("keys", "lengths", *([] if meta["lists"][place] else ["ids"])):
            (folder / f"{name}-{place}").unlink()
    described, arrays = dump(encoders)
    with open(folder / "vocabularies", "wb") as stream:
        for array in arrays.values():
            stream.write(array)
    sizes = {name: len(array) for name, array in arrays.items()}
    return {"encoders": described, "lengths": sizes, "dtype": str(dtype), "dtypes": meta["dtypes"]}


def _bare(folder: Path, meta: dict[str, Any], schema: Schema) -> ClickDataset:
    """The log without its features."""
    rows = meta["rows"]
    return ClickDataset(
        name="table",
        columns=[],
        labels=map_file(folder / "labels", np.float32, (rows,)),
        dense=map_file(folder / "dense", np.float32, (rows, len(schema.dense))),
        times=map_file(folder / "times", np.float64, (rows,)) if meta["has_times"] else None,
        users=map_file(folder / "users", np.int64, (rows,)) if meta["has_users"] else None,
        default_split=schema.split or "time",
    )


def _open(folder: Path, meta: dict[str, Any], schema: Schema, files: Sequence[Path]) -> ClickDataset:
    rows = meta["rows"]
    flat = map_file(folder / "vocabularies", np.int64, (sum(meta["lengths"].values()),))
    arrays, start = {}, 0
    for name, length in meta["lengths"].items():
        arrays[name] = flat[start : start + length]
        start += length
    encoders = restore(meta["encoders"], arrays)
    matrix = map_file(folder / "ids", meta["dtype"], (rows, meta["lists"].count(False)))
    views, columns = iter(matrix.T), []
    for place, name in enumerate(schema.features):
        ids, offsets = None, None
        if meta["lists"][place]:
            offsets = map_file(folder / f"offsets-{place}", np.int64, (rows + 1,))
            ids = map_file(folder / f"ids-{place}", meta["dtypes"][place], (int(offsets[-1]),))
        else:
            ids = next(views)
        columns.append(Column.of_checked(name, encoders[name].size, ids, offsets))
    bare = _bare(folder, meta, schema)
    return ClickDataset(
        name="table",
        columns=columns,
        labels=bare.labels,
        dense=bare.dense,
        times=bare.times,
        users=bare.users,
        default_split=bare.default_split,
        info={"source": ", ".join(map(str, files))},
        vocabularies=encoders,
        labelled=schema.label is not None,
        matrix=matrix,
    )
