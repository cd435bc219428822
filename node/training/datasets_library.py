"""Files of a Hugging Face data set as streams of documents, on this machine or on the hub (an extra: `datasets`).

A name that begins with HUB is a data set of the hub, and everything else is a path here: a path with a mistake in it
never goes to the network. The hub is reached only where the person at this machine has named one of its data sets;
otherwise the libraries are told to stay offline. What is read is FORMATS: none of them holds code.

The library is imported where a data set is opened, in the trainer's process alone.

Invariant: memory is bounded by what the library reads at a time and by DOCUMENT_CHARACTERS_MAX.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from shoal.node.training.documents import JSON_LINES, PARQUET
from shoal.node.training.messages import DatasetChoice
from shoal.node.training.task_faults import TaskFault, blame
from shoal.protocol.errors import ConfigError

FIELD = "trainer.dataset"
HUB = "hf://datasets/"
FORMATS = ("arrow", "csv", "json", "parquet", "text")
FORMATS_BY_SUFFIX = {JSON_LINES: "json", ".json": "json", PARQUET: "parquet", ".csv": "csv", ".arrow": "arrow"}
DOCUMENT_CHARACTERS_MAX = 1 << 24  # of a longer one the rest is left out
ROWS_JUDGED = 1000  # after as many it is said that most of them have no text
INSTALL_DATASETS = "install it: pip install 'shoal[datasets]'"

# Read by the libraries when they are imported.
_HUB_CACHES = ("HF_HUB_CACHE", "HF_XET_CACHE")
_QUIET = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def is_on_hub(dataset: str) -> bool:
    return dataset.startswith(HUB)


def choose_hub_access(choice: DatasetChoice | None, folder: Path | None = None) -> None:
    """Decide, before any of the libraries is imported, whether they may reach the hub from this process, and that what
    they keep of it lies in `folder`, where there is one."""
    os.environ.update(_QUIET)
    is_wanted = choice is not None and is_on_hub(choice.path)
    os.environ["HF_HUB_OFFLINE"] = "0" if is_wanted else "1"
    if is_wanted and folder is not None:
        os.environ.update({name: str(folder / "datasets" / "hub") for name in _HUB_CACHES})


class DatasetFiles:
    """The files of one split, each a stream of documents that goes on from a state of its own."""

    def __init__(self, choice: DatasetChoice, cache: Path | None) -> None:
        """`cache` is a folder for what the library notes of a data set. Raises ConfigError."""
        self._choice = choice
        library = _import_datasets()
        with _tell_choice(choice):
            builder = _open_builder(library, choice, cache)
            kind = type(builder).__module__.rpartition(".")[2]
            if kind not in FORMATS:
                fix = f"give files of one of these: {', '.join(FORMATS)}"
                raise ConfigError(FIELD, f"{choice.path} holds {kind!r}, which is no table of texts", fix)
            self._rows: Any = builder.as_streaming_dataset(split=choice.split)
            if kind == "parquet" and choice.column in (self._rows.column_names or ()):
                # Of a wide table the other columns would be read, or come over the network, for nothing.
                builder.config.columns = [choice.column]
                self._rows = builder.as_streaming_dataset(split=choice.split)
            self.count: int = self._rows.num_shards
        self._read = self._bad = 0  # rows, and those without a text
        self._columns: tuple[str, ...] = ()
        self._is_judged = False

    def told(self) -> AbstractContextManager[None]:
        """Inside, what the library raises is an error of the configuration."""
        return _tell_choice(self._choice)

    def read(self, number: int, state: Mapping[str, Any] | None) -> "DocumentReader":
        """File `number` from a reader's state on, None is its beginning."""
        rows = self._rows.shard(num_shards=self.count, index=number)
        if state is not None:
            rows.load_state_dict(dict(state))
        return DocumentReader(self, rows)

    def find_text(self, row: Mapping[str, Any]) -> str | None:
        """What the column holds, None where that is no text. Raises ConfigError where most of the first rows have
        none."""
        text = row.get(self._choice.column)
        is_text = isinstance(text, str) and bool(text)
        self._read += 1
        self._bad += not is_text
        if self._read == 1:
            self._columns = tuple(str(name) for name in row)
        if self._read == ROWS_JUDGED and not self._is_judged:
            self.judge_rows()
        return str(text)[:DOCUMENT_CHARACTERS_MAX] if is_text else None

    def judge_rows(self) -> None:
        """Raises ConfigError where more than half of the rows so far have no text: that is another column. Once is
        enough: what is trained on goes on without the rows that have none."""
        self._is_judged = True
        if 2 * self._bad > self._read:
            column, names = self._choice.column, ", ".join(self._columns[:8]) or "none"
            problem = f"{self._bad} of {self._read} rows of {self._choice.path} have no text in {column!r}"
            fix = f"name the column of the texts in trainer.dataset_column (the columns: {names})"
            raise ConfigError(FIELD, problem, fix)

    @property
    def notice(self) -> str:
        if not self._bad:
            return ""
        column = self._choice.column
        return f"{FIELD}: {self._bad} of the first {self._read} rows have no text in {column!r} and are left out"


class DocumentReader:
    """The documents of one file. `state` is where it stands: plain values that JSON keeps."""

    def __init__(self, files: DatasetFiles, rows: Any) -> None:
        self._files = files
        self._rows = rows

    def state(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self._rows.state_dict()
        return found

    def __iter__(self) -> Iterator[str]:
        for row in self._rows:
            text = self._files.find_text(row)
            if text is not None:
                yield text


def _import_datasets() -> Any:
    try:
        library: Any = import_module("datasets")
    except ModuleNotFoundError as error:
        problem = f"needs the library datasets: there is no {error.name} here"
        raise ConfigError(FIELD, problem, INSTALL_DATASETS) from error
    library.disable_progress_bars()
    library.logging.set_verbosity_error()
    return library


def _open_builder(library: Any, choice: DatasetChoice, cache: Path | None) -> Any:
    options: dict[str, Any] = {"cache_dir": None if cache is None else str(cache)}
    path = Path(choice.path)
    if not is_on_hub(choice.path) and path.is_file():
        if choice.config_name is not None:
            fix = "take it out of the configuration"
            raise ConfigError("trainer.dataset_config", f"{choice.path} is a file and has no configurations", fix)
        kind = FORMATS_BY_SUFFIX.get(path.suffix, "text")
        return library.load_dataset_builder(kind, data_files={choice.split: [choice.path]}, **options)
    if is_on_hub(choice.path):
        name, _, revision = choice.path.partition("@")
        return library.load_dataset_builder(name, choice.config_name, revision=revision or None, **options)
    return library.load_dataset_builder(choice.path, choice.config_name, **options)


@contextmanager
def _tell_choice(choice: DatasetChoice) -> Iterator[None]:
    """What the library raises about a data set is an error of the configuration."""
    try:
        with blame("datasets"):
            yield
    except TaskFault as fault:
        cause = fault.__cause__
        if isinstance(cause, ConnectionError) and is_on_hub(choice.path):
            problem = f"the Hugging Face hub cannot be reached for {choice.path}: {cause}"
            fix = "look at this machine's way to huggingface.co, or download the data set and give its folder"
        elif is_on_hub(choice.path):
            problem = f"{choice.path} cannot be read: {fault}"
            fix = "look at its page on the hub for its name, trainer.dataset_config and trainer.dataset_split"
        else:
            problem = f"{choice.path} cannot be read: {fault}"
            fix = "give a .jsonl, .parquet, .csv, .arrow or text file, or a folder of them, and a split that it has"
        raise ConfigError(FIELD, problem[:900], fix) from fault
