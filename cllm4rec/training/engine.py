"""Engines turn losses into optimizer steps: DeepSpeed on a cluster, plain torch without one, behind one interface.

The loop divides each loss by the number of documents of the whole step, so an engine sums gradients over micro-batches and
workers. If the loop names the users of this worker, the worker steps the rows of these users locally. The state of Adam is
exported and imported as named float32 tensors that are the same for every engine, ZeRO stage and number of workers. No
pickle is involved, and a run can resume on other hardware.

Shapes: I users, K hidden size.
"""

from __future__ import annotations

import abc
import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cllm4rec.config import TrainingConfig
from cllm4rec.model.batch import TensorBatch
from cllm4rec.model.cllm4rec import TABLES
from cllm4rec.model.packing import USER_TABLES
from cllm4rec.training import zero3
from cllm4rec.training.row_adam import BETAS, EPS, MOMENTS, RowAdam
from cllm4rec.training.shares import Value, share_of, whole
from cllm4rec.typing import IntArray

Moments = dict[str, Value]
"""`<parameter>` → value, `<parameter>.exp_avg` and `<parameter>.exp_avg_sq` → Adam's moments, `step` → steps taken."""


Encoder = Callable[[Iterator[TensorBatch]], Iterator[Tensor]]
"""Batches → the hidden states of all slots of each, (S, K)."""


class Engine(abc.ABC):
    """Steps the trainable parameters of a module with Adam."""

    gradient_scale = 1.0
    """The factor by which `backward` multiplies gradients before they are averaged over workers."""

    def __init__(self, module: nn.Module, training: TrainingConfig, learning_rate: float, accumulation: int) -> None:
        """accumulation: micro-batches per optimizer step and worker."""
        self.training, self.learning_rate, self.accumulation = training, learning_rate, accumulation
        self.trained = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
        self.num_workers = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0

    @abc.abstractmethod
    def forward(self, *inputs: Any) -> Any:
        """Call the module."""

    @abc.abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss to those of the current step."""

    @abc.abstractmethod
    def step(self) -> None:
        """After `accumulation` backward calls: sum gradients over workers, clip them, step, and clear them."""

    @abc.abstractmethod
    def state(self) -> Moments:
        """All trained parameters and the state of Adam, as `weights` gives them. Every worker must call it."""

    @abc.abstractmethod
    def load_moments(self, state: Moments, empty_inputs: tuple[Any, ...]) -> None:
        """Load the state of Adam. The parameters must be in the module before the engine is created.

        empty_inputs: inputs of `forward` with a batch without documents. Every worker must call it.
        """

    def sync_lazy_rows(self) -> None:  # noqa: B027 - most engines have no lazy rows
        """Apply all steps to all parameters, before the module is used elsewhere. Every worker must call it."""

    @contextlib.contextmanager
    def ranking(self, empty_batch: TensorBatch) -> Iterator[Encoder | None]:
        """Prepare the module for ranking for the time of a block. Every worker must enter it.

        Gives the function through which batches pass the language model, or None if the module may be called by itself.
        empty_batch: a batch without documents.
        """
        self.sync_lazy_rows()
        yield None

    def weights(self) -> dict[str, Value]:
        """The trained parameters, on the CPU: whole, or with ZeRO-3 this worker's shares. Every worker must call it."""
        return {name: weight.detach().cpu().clone() for name, weight in self.trained.items()}

    def sum(self, *numbers: float) -> list[float]:
        """The sum of each number over all workers, in float64. Every worker must call it."""
        if self.num_workers == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64, device=next(iter(self.trained.values())).device)
        dist.all_reduce(total)
        return [float(number) for number in total.tolist()]


class TorchEngine(Engine):
    """Plain torch: one process, or several processes that all-reduce their gradients."""

    def __init__(self, module: nn.Module, training: TrainingConfig, learning_rate: float, accumulation: int) -> None:
        super().__init__(module, training, learning_rate, accumulation)
        self.module = module
        self.optimizer = _adam(self.trained.values(), learning_rate)

    def forward(self, *inputs: Any) -> Any:
        return self.module(*inputs)

    def backward(self, loss: Tensor) -> None:
        torch.autograd.backward(loss)

    def step(self) -> None:
        if self.num_workers > 1:
            for weight in self.trained.values():
                if weight.grad is not None:
                    dist.all_reduce(weight.grad)
        if self.training.gradient_clipping is not None:
            torch.nn.utils.clip_grad_norm_(list(self.trained.values()), self.training.gradient_clipping)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> Moments:
        return _adam_state(self.optimizer, self.trained)

    def load_moments(self, state: Moments, empty_inputs: tuple[Any, ...]) -> None:
        _load_adam(self.optimizer, self.trained, state)


def bucket_elements(num_trained: int) -> int:
    """The size of DeepSpeed's buffer of gradients that are sent together. Larger parameters are sent alone."""
    return max(1, min(num_trained, _MAX_BUCKET))


_MAX_BUCKET = 50_000_000


class DeepSpeedEngine(Engine):
    """DeepSpeed in a Ray Train worker: ZeRO stages 0 to 3, accumulation and clipping, with float32 tables.

    The module itself runs the backbone in bfloat16. DeepSpeed's bf16 mode is off because it would round the tables.
    """

    def __init__(self, module: nn.Module, training: TrainingConfig, learning_rate: float, accumulation: int) -> None:
        super().__init__(module, training, learning_rate, accumulation)
        self.gradient_scale = float(self.num_workers)
        import deepspeed

        self._deepspeed = deepspeed
        if self.num_workers == 1:
            # DeepSpeed would compile its shared-memory collectives, 20 s and 1.7 GB, which a single worker does not use.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._module = module
        self._shapes = {name: zero3.whole_shape(weight) for name, weight in self.trained.items()}
        wrapper = {2: SingleBackwardNode, 3: zero3.TrainsAndRanks}.get(training.zero_stage, lambda whole: whole)
        self.engine, _, _, _ = deepspeed.initialize(
            model=wrapper(module),
            optimizer=_adam(self.trained.values(), learning_rate),
            config=self._config(),
            dist_init_required=False,
        )
        if training.zero_stage == 3:
            self._register_word_embeddings(module)

    def forward(self, *inputs: Any) -> Any:
        return self.engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        # Undoes DeepSpeed's average over workers and micro-batches: the loop has already divided by the documents.
        self.engine.backward(loss * (self.num_workers * self.accumulation))
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()

    def step(self) -> None:
        self.engine.step()

    @contextlib.contextmanager
    def ranking(self, empty_batch: TensorBatch) -> Iterator[Encoder | None]:
        if self.training.zero_stage < 3:
            yield None
            return
        own: Any = self._module
        with zero3.gathered(own.own_parameters().values()):
            yield functools.partial(self._hidden_states, empty_batch=empty_batch)

    def _hidden_states(self, batches: Iterator[TensorBatch], empty_batch: TensorBatch) -> Iterator[Tensor]:
        """The hidden states of batches. A worker without batches left takes part with empty ones: layers are gathered."""
        while True:
            batch = next(batches, None)
            if self.sum(float(batch is not None))[0] == 0:
                return
            # Not in inference mode: small parameters stay gathered, and training reads them again.
            with torch.inference_mode(False), torch.no_grad():
                hidden_SK = self.engine(empty_batch if batch is None else batch, hidden_states=True)
            if batch is not None:
                yield hidden_SK

    def weights(self) -> dict[str, Value]:
        if self.training.zero_stage == 0:
            return super().weights()
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_local_fp32_param

        if self.training.zero_stage == 3:
            return {
                name: zero3.as_share(safe_get_local_fp32_param(weight), weight) for name, weight in self.trained.items()
            }
        return {
            name: safe_get_full_fp32_param(weight).detach().cpu().clone().view(self._shapes[name])
            for name, weight in self.trained.items()
        }

    def state(self) -> Moments:
        if self.training.zero_stage == 0:
            return _adam_state(self.engine.optimizer, self.trained)
        from deepspeed.utils import safe_get_full_optimizer_state, safe_get_local_optimizer_state

        step = self._step_counters()[0].detach().cpu().clone()
        if self.training.zero_stage == 3:
            divided: Moments = {"step": share_of(step, self.rank, self.num_workers), **self.weights()}
            for name, weight in self.trained.items():
                for moment in MOMENTS:
                    local = safe_get_local_optimizer_state(weight, moment)
                    divided[f"{name}.{moment}"] = zero3.as_share(local, weight)
            return divided
        state: Moments = {"step": step, **self.weights()}
        for name, weight in self.trained.items():
            for moment in MOMENTS:
                full = safe_get_full_optimizer_state(weight, moment)
                state[f"{name}.{moment}"] = full.detach().cpu().clone().view(self._shapes[name])
        return state

    def load_moments(self, state: Moments, empty_inputs: tuple[Any, ...]) -> None:
        if self.training.zero_stage == 0:
            _load_adam(self.engine.optimizer, self.trained, state)
            return
        # ZeRO creates its moments in the first step. A step with zero gradients creates them and changes no parameter.
        for _ in range(self.accumulation):
            self.backward(self.forward(*empty_inputs).total)
        self.step()
        for name, weight in self.trained.items():
            for moment in MOMENTS:
                self._set_moment(weight, state[f"{name}.{moment}"], moment)
        for counter in self._step_counters():
            counter.fill_(float(whole(state["step"])))

    def _set_moment(self, weight: nn.Parameter, value: Value, moment: str) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self.training.zero_stage < 3:
            safe_set_full_optimizer_state(weight, whole(value).to(weight.device), moment)
            return
        # DeepSpeed's own setter accepts only tensors that divide evenly.
        safe_set_local_optimizer_state(weight, zero3.padded_share(value, weight), moment)

    def _step_counters(self) -> list[Tensor]:
        counters = [adam["step"] for adam in self.engine.optimizer.optimizer.state.values() if "step" in adam]
        return counters or [torch.zeros(())]

    def _register_word_embeddings(self, module: nn.Module) -> None:
        # The model reads these two parameters outside the submodule that owns them. ZeRO-3 requires their registration.
        backbone: Any = module.backbone
        head = backbone.word_head
        shared = [
            weight
            for weight in (backbone.word_embeddings, head.table_NK, head.bias_N)
            if isinstance(weight, nn.Parameter)
        ]
        for weight in {id(weight): weight for weight in shared}.values():
            self._deepspeed.zero.register_external_parameter(module, weight)

    def _config(self) -> dict[str, Any]:
        num_trained = sum(shape.numel() for shape in self._shapes.values())
        zero: dict[str, Any] = {
            "stage": self.training.zero_stage,
            # DeepSpeed allocates the whole bucket, 2 GB by default, even if it trains little.
            "reduce_bucket_size": bucket_elements(num_trained),
        }
        if self.training.zero_stage == 3:
            zero |= zero3.limits(self._module)
        if self.training.cpu_offload:
            zero["offload_optimizer"] = {"device": "cpu"}
            if self.training.zero_stage == 3:
                zero["offload_param"] = {"device": "cpu"}
        return {
            # 1, so that train_batch_size is accumulation × workers. The loop counts documents.
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": self.training.gradient_clipping or 0.0,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # it would be compiled; torch has a fused Adam for CPUs
        }


class RowWiseEngine(Engine):
    """Steps the user tables row by row (`row_adam`), each worker those of its own users, and the rest with another engine.

    User gradients are not sent over the network. `sync_lazy_rows`, `weights` and `state` combine the rows of all workers.
    """

    def __init__(
        self, module: nn.Module, training: TrainingConfig, learning_rate: float, accumulation: int, users: IntArray
    ) -> None:
        super().__init__(module, training, learning_rate, accumulation)
        assert training.gradient_clipping is None, "clipping needs the norm of all gradients"
        self.tables = {name: weight for name, weight in self.trained.items() if name in _USER_TABLES}
        for table in self.tables.values():
            table.requires_grad_(False)
        self.dense_engine = _dense_engine(module, training, learning_rate, accumulation)
        self._owned_I = self._owned(users)
        self.rows = RowAdam(self.tables, self._owned_I.nonzero().flatten(), learning_rate)
        self._is_synced = True

    def forward(self, *inputs: Any) -> Any:
        batch: TensorBatch = inputs[0]
        return self.dense_engine.forward(*inputs, self.rows.read(batch.distinct_users))

    def backward(self, loss: Tensor) -> None:
        self.dense_engine.backward(loss)

    def step(self) -> None:
        self.dense_engine.step()
        self.rows.step(self.dense_engine.gradient_scale)
        self._is_synced = False

    def sync_lazy_rows(self) -> None:
        if not self._is_synced:
            self.rows.flush()
            for table in self.tables.values():
                self._gather_rows(table)
        self._is_synced = True

    def weights(self) -> dict[str, Value]:
        self.sync_lazy_rows()
        user_tables = {name: table.detach().cpu().clone() for name, table in self.tables.items()}
        return {**self.dense_engine.weights(), **user_tables}

    def state(self) -> Moments:
        state = {**self.dense_engine.state(), **self.weights()}
        for name, table in self.tables.items():
            for moment in MOMENTS:
                whole_IK = torch.zeros_like(table)
                whole_IK.index_copy_(0, self.rows.owned_V, self.rows.moments_VK[name][moment])
                state[f"{name}.{moment}"] = self._gather_rows(whole_IK).cpu()
        return state

    def load_moments(self, state: Moments, empty_inputs: tuple[Any, ...]) -> None:
        self.dense_engine.load_moments(state, empty_inputs)
        moments = {name: {moment: whole(state[f"{name}.{moment}"]) for moment in MOMENTS} for name in self.tables}
        self.rows.load(moments, int(whole(state["step"])))

    def _owned(self, users: IntArray) -> Tensor:
        """(I,) booleans: the rows of this worker. The first worker also owns the rows of users without documents."""
        table = next(iter(self.tables.values()))
        has_documents_I = torch.zeros(len(table), dtype=torch.int32, device=table.device)
        has_documents_I[torch.from_numpy(users).to(table.device)] = 1
        num_owners_I = has_documents_I.clone()
        if self.num_workers > 1:
            dist.all_reduce(num_owners_I)
        assert bool((num_owners_I <= 1).all()), "two workers have documents of one user"
        return (has_documents_I == 1) | ((num_owners_I == 0) & (self.rank == 0))

    @torch.no_grad()
    def _gather_rows(self, rows_IK: Tensor) -> Tensor:
        """Replace every row by that of its owner, in place."""
        if self.num_workers > 1:
            rows_IK[~self._owned_I] = 0.0
            dist.all_reduce(rows_IK)
        return rows_IK


class SingleBackwardNode(nn.Module):
    """Wraps a module so that all its parameters receive their gradients together, at the end of backward, in a fixed order.

    ZeRO-2 reduces gradients in the order in which backward produces them and assumes the same order on all workers. Without
    this wrapper the order depends on the content of a batch, and a worker without texts or documents would add the gradients
    of different parameters.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any) -> Any:
        trained = {name: weight for name, weight in self.module.named_parameters() if weight.requires_grad}
        joined = _JoinedIdentity.apply(*trained.values())  # type: ignore[no-untyped-call]
        return torch.func.functional_call(self.module, dict(zip(trained, joined, strict=True)), inputs)


class _JoinedIdentity(torch.autograd.Function):
    """The identity of several tensors. Its backward runs once, after the gradients of all of them are computed."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients


_USER_TABLES = [TABLES[table] for table in USER_TABLES]


def make_engine(
    module: nn.Module,
    training: TrainingConfig,
    learning_rate: float,
    accumulation: int = 1,
    users: IntArray | None = None,
) -> Engine:
    """The engine that the config asks for.

    users: the users that only the batches of this worker read. Their rows of the user tables are stepped row by row.
    Without `users`, or if the user tables are the only trained parameters, the user tables are stepped as dense parameters.
    """
    trained = {name for name, weight in module.named_parameters() if weight.requires_grad}
    if users is None or trained.isdisjoint(_USER_TABLES) or trained <= set(_USER_TABLES):
        return _dense_engine(module, training, learning_rate, accumulation)
    return RowWiseEngine(module, training, learning_rate, accumulation, users)


def _dense_engine(module: nn.Module, training: TrainingConfig, learning_rate: float, accumulation: int) -> Engine:
    engine = DeepSpeedEngine if training.engine == "deepspeed" else TorchEngine
    return engine(module, training, learning_rate, accumulation)


def _adam(parameters: Iterable[nn.Parameter], learning_rate: float) -> torch.optim.Adam:
    # fused: one pass over values and moments instead of one per operation.
    return torch.optim.Adam(parameters, lr=learning_rate, betas=BETAS, eps=EPS, fused=True)


def _adam_state(optimizer: torch.optim.Optimizer, trained: dict[str, nn.Parameter]) -> Moments:
    state: Moments = {"step": torch.zeros(())}
    for name, weight in trained.items():
        adam = optimizer.state.get(weight, {})
        state[name] = weight.detach().cpu().clone()
        for moment in MOMENTS:
            state[f"{name}.{moment}"] = adam.get(moment, torch.zeros_like(weight)).cpu().clone()
        state["step"] = adam.get("step", torch.zeros(())).cpu().clone()
    return state


def _load_adam(optimizer: torch.optim.Optimizer, trained: dict[str, nn.Parameter], state: Moments) -> None:
    for name, weight in trained.items():
        moments = {moment: whole(state[f"{name}.{moment}"]).to(weight.device).clone() for moment in MOMENTS}
        optimizer.state[weight] = {"step": whole(state["step"]).to(weight.device).clone(), **moments}
