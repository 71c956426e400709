"""A run as a client on a machine of its own opens it: its own data, its own copy of the model, all else the run's.

Of what the server sent, neither a path nor the place of a model is used.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fedlab.config import RunConfig
from fedlab.config.client import ClientFile
from fedlab.data.opening import own_records, stamps_of
from fedlab.errors import ConfigError
from fedlab.models.fingerprint import check_fingerprint, model_fingerprint
from fedlab.models.hidden_states import cache_hidden_states
from fedlab.models.loading import build
from fedlab.objectives import objective_class
from fedlab.session import Session, check_vocabulary, torch_threads


@dataclass
class OwnSessions:
    """What a client's process holds open: the last run's session, opened anew if the run, or the data, are others."""

    file: ClientFile
    _key: tuple[str, dict[str, tuple[int, int, int]]] | None = None
    _session: Session | None = field(default=None, repr=False)

    def open(self, text: str) -> Session:
        """The session of a resolved configuration.

        Raises:
            ConfigError: model or data cannot be opened, or do not work with the configuration.
            LabelError: the data have a label that the run does not name.
        """
        key = (text, stamps_of(self.file.data.section(64)))
        if self._session is None or self._key != key:
            self._key, self._session = None, None  # the old data go before the new ones come
            self._session, self._key = open_own(RunConfig.parse(text), self.file), key
        return self._session


def own_config(config: RunConfig, file: ClientFile) -> RunConfig:
    """The run's configuration with the place of this client's own copy of the model, and its own machine.

    Raises ConfigError if it has no such model.
    """
    if config.model.name not in file.models:
        raise ConfigError(
            f'model.name = "{config.model.name}" is none of this client\'s: [models."…"] names {", ".join(file.models)}'
        )
    copy = file.models[config.model.name]
    place = {"name": copy.path or config.model.name, "revision": copy.revision}  # whoever names a revision names files
    model = config.model.model_copy(update=place)
    own = {"threads": file.machine.threads, "device": file.machine.device}
    run = config.run.model_copy(update={key: value for key, value in own.items() if value is not None})
    return config.model_copy(update={"model": model, "run": run})


def open_own(config: RunConfig, file: ClientFile) -> Session:
    """Open model and data of a client. Raises as ``OwnSessions.open``."""
    own = own_config(config, file)
    if allowed := file.models[config.model.name].sha256:
        check_fingerprint(model_fingerprint(own.model), allowed, f'[models."{config.model.name}"] sha256')
    section = file.data.section(config.data.max_length)
    records = own_records(section, file.client.id, own)
    kind = objective_class(config.objective.name)
    model = build(own, kind.of(config.objective, config.objective.labels, records.groups))
    data = records.tokenised(model.tokenizer, section.max_length, model.objective)
    check_vocabulary(model, data.tokens, own.model.name)
    if own.run.cache_hidden_states:
        with torch_threads(own.run.threads):
            data = cache_hidden_states(model, data)
    return Session(own, model, data)
