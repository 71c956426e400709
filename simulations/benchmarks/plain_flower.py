"""What a user would write without fedlab: a Flower message-API app with Opacus and peft, after Flower's own
``examples/opacus``.

One client per SuperNode and message. A message brings the global tensors; the client puts them into its model, wraps
model, optimiser and loader with a new ``PrivacyEngine``, takes its steps and returns its tensors; FedAvg averages.
``KEEP`` decides whether the model stays loaded in the process between messages, or is built for each message as the
example does. It is made as cheap as it can be without leaving that form: adapters and head travel, not the model; the
tokens are fedlab's, memory-mapped; dropout is off; nothing is evaluated.
"""

from __future__ import annotations

import os
import time
import warnings
from itertools import islice
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from fedlab.config import RunConfig
from fedlab.data import FederatedData, objective_of, open_data
from fedlab.models.loading import load_base, load_tokenizer

KEEP, CONFIG = "PLAIN_FLOWER_KEEP", "PLAIN_FLOWER_CONFIG"  # environment of server and clients
_kept: dict[str, Any] = {}


def configuration() -> RunConfig:
    """The run's configuration, as TOML in the environment."""
    return RunConfig.parse(os.environ[CONFIG])


def make_model(config: RunConfig) -> torch.nn.Module:
    """The base with peft's adapter, B and head trained, A frozen and equal everywhere."""
    from peft import LoraConfig, TaskType, get_peft_model

    base, head = load_base(config.model, objective_of(config))
    torch.manual_seed(0)
    targets = config.lora.target_modules
    settings = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=config.lora.rank,
        lora_alpha=int(config.lora.alpha),
        target_modules=targets if isinstance(targets, str) else list(targets),
        modules_to_save=head,
    )
    model: Any = get_peft_model(base, settings)  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name or "modules_to_save" in name)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # (attention reads p itself, so eval() would not turn it off)
    return model  # type: ignore[no-any-return]


def trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What travels."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def data_of(config: RunConfig) -> FederatedData:
    """Tokens and shards, opened once per process (the example keeps its ``FederatedDataset`` too)."""
    if "data" not in _kept:
        tokenizer = load_tokenizer(config.model)
        _kept["data"], _kept["pad"] = open_data(config, tokenizer, objective_of(config)), tokenizer.pad_token_id
    return _kept["data"]  # type: ignore[no-any-return]


def model_of(config: RunConfig) -> torch.nn.Module:
    """The kept model, or a new one."""
    if os.environ.get(KEEP) != "1":
        return make_model(config)
    if "model" not in _kept:
        _kept["model"] = make_model(config)
    return _kept["model"]  # type: ignore[no-any-return]


def fit(config: RunConfig, model: torch.nn.Module, data: FederatedData, client: str) -> tuple[int, float]:
    """``train.steps`` steps of DP-SGD by Opacus. Returns the examples seen and their mean loss."""
    from opacus import PrivacyEngine

    def collate(rows: list[tuple[torch.Tensor]]) -> dict[str, torch.Tensor]:
        return data.tokens.batch(torch.stack([row[0] for row in rows]).numpy(), _kept["pad"])

    own = TensorDataset(torch.from_numpy(data.train(client)))
    loader = DataLoader(own, batch_size=config.train.batch_size, collate_fn=collate)
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=config.train.lr, momentum=config.train.momentum
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        private, private_optimizer, private_loader = PrivacyEngine(secure_mode=False).make_private(
            module=model,
            optimizer=optimizer,
            data_loader=loader,
            noise_multiplier=config.privacy.sigma or 0.0,
            max_grad_norm=config.privacy.clip or 0.0,
        )
    seen, losses = 0, 0.0
    try:
        for batch in islice(endless(private_loader), config.train.steps):
            private_optimizer.zero_grad()
            if not isinstance(batch, dict) or not len(batch["labels"]):
                # an empty draw: Opacus' loader gives a list, or tensors without rows, which the model cannot take
                continue
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            loss = cross_entropy(private(**inputs).logits, batch["labels"])
            loss.backward()
            seen, losses = seen + len(batch["labels"]), losses + float(loss.detach()) * len(batch["labels"])
            private_optimizer.step()
    finally:
        private.remove_hooks()
        for parameter in model.parameters():
            parameter.grad = None
            if hasattr(parameter, "grad_sample"):
                del parameter.grad_sample
    return seen, losses / max(1, seen)


def endless(loader: Any) -> Any:
    """The loader's batches, epoch after epoch."""
    while True:
        yield from loader


client_app = ClientApp()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """One client's round."""
    torch.set_num_threads(1)
    config = configuration()
    data, model = data_of(config), model_of(config)
    tensors = trained(model)
    with torch.no_grad():
        for name, value in message.content.array_records["arrays"].to_torch_state_dict().items():
            tensors[name].copy_(value)
    seen, loss = fit(config, model, data, data.clients[int(context.node_config["partition-id"])])
    update = ArrayRecord({name: value.detach() for name, value in tensors.items()})
    metrics = MetricRecord({"num-examples": len(data.train(data.clients[0])), "seen": seen, "loss": loss})
    return Message(RecordDict({"arrays": update, "metrics": metrics}), reply_to=message)


class TimedFedAvg(FedAvg):
    """Flower's FedAvg that notes when each round began and ended, and what was seen in it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.rounds: list[dict[str, float]] = []
        self._started = 0.0

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Any:
        self._started = time.perf_counter()
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        replies = list(replies)
        metrics = [reply.content.metric_records["metrics"] for reply in replies if not reply.has_error()]
        if len(metrics) < len(replies):
            raise RuntimeError(" / ".join({str(reply.error.reason) for reply in replies if reply.has_error()}))
        result = super().aggregate_train(server_round, replies)
        seen = sum(float(m["seen"]) for m in metrics)  # type: ignore[arg-type]
        loss = sum(float(m["seen"]) * float(m["loss"]) for m in metrics) / max(1.0, seen)  # type: ignore[arg-type]
        self.rounds.append({"seconds": time.perf_counter() - self._started, "examples": seen, "loss": loss})
        return result


def run(config: RunConfig, keep: bool) -> list[dict[str, float]]:
    """Seconds, examples and loss of each round, on Flower's own simulation runtime."""
    from flwr.simulation import run_simulation

    os.environ |= {CONFIG: config.to_toml(), KEEP: "1" if keep else "0"}
    outcome: dict[str, Any] = {}
    server_app = ServerApp()
    count = config.population

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            strategy = TimedFedAvg(fraction_evaluate=0.0, min_train_nodes=count, min_available_nodes=count)
            start = ArrayRecord({name: value.detach() for name, value in trained(make_model(config)).items()})
            strategy.start(grid, start, num_rounds=config.run.rounds)
            outcome["rounds"] = strategy.rounds
        except BaseException as error:  # Flower's runtime would hide it
            outcome["error"] = error

    resources = {"num_cpus": config.run.cpus_per_node, "num_gpus": config.run.gpus_per_node}
    init = {
        "num_cpus": int(config.run.nodes * config.run.cpus_per_node),
        "include_dashboard": False,
        "log_to_driver": False,
    }
    run_simulation(server_app, client_app, count, backend_config={"client_resources": resources, "init_args": init})  # type: ignore[dict-item]
    if "rounds" not in outcome:
        raise RuntimeError(f"the plain Flower app failed: {outcome.get('error')}")
    return outcome["rounds"]  # type: ignore[no-any-return]
