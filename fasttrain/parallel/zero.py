"""ZeRO: every rank keeps the optimizer's state of its part of the parameters only, and steps that part.

S. Rajbhandari, J. Rasley, O. Ruwase, Y. He, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models",
arXiv:1910.02054, section 5: stage 1 divides the states of the optimizer, stage 2 the reduced gradients too. What a rank
owns is in `zero_cut`, how gradients come to it in `zero_method`, what it steps in `zero_pieces`, how states go out and
come back in `zero_state`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fasttrain.dist.fingerprint import agree, fingerprint
from fasttrain.dist.layout import FlatLayout
from fasttrain.optim import Optimizer
from fasttrain.parallel import zero_state, zero_weights
from fasttrain.parallel.reducer import Reducer
from fasttrain.parallel.zero_buckets import Memory, rotation
from fasttrain.parallel.zero_cut import Cut
from fasttrain.parallel.zero_gather import Gathering
from fasttrain.parallel.zero_groups import Division, cuts_of, divisions
from fasttrain.parallel.zero_method import Scatter
from fasttrain.parallel.zero_pieces import Piece, codecs_of, costs, divisible, patterns, pieces, samples
from fasttrain.parallel.zero_refused import check_divisible, check_memory, check_wire, others_refused, reducer_of
from fasttrain.parallel.zero_step import OWN, Stepping
from fasttrain.precision.codecs import STOCHASTIC


class Zero(Stepping):
    """An optimizer of which every rank keeps its part: 1 / ranks of the states, and of the work of a step.

    It takes the place of torch's `ZeroRedundancyOptimizer`, with `fasttrain.parallel.DataParallel` in the place of
    torch's. Backward then ends with a reduce-scatter of gradients, and a step with an all-gather of parameters:
    together the bytes of one all-reduce. Elementwise rules of this package are cut anywhere, and come out in the bits
    of the optimizer that is not divided, given the same gradients; everything else (Muon, SOAP, Adafactor, LAMB, LARS,
    StableAdamW, `clip_each`, torch's optimizers) gets whole parameters, balanced by cost.

    **After a synchronised backward pass the mean is in shards**, of which each rank has its own. `p.grad` then cannot
    be read or written: torch's `clip_grad_norm_` raises, and `clip_grad_norm_` here does what it would. Synchronised
    backward passes between two steps add up; `step` and `zero_grad` forget the gradients (`zero_grad` of a
    `DataParallel` too, that of the bare module does not).

    Arguments:
        params: a `DataParallel` or `Reducer`; or, as torch's optimizers take them, parameters, named parameters or
            groups that together are all trained parameters of one. They become views of flat memory, with their
            strides.
        optimizer_class: of this package, or of `torch.optim`.
        stage: 1, or 2, which keeps no reduced gradients but the rank's own: at most `rotating` buckets are in flight.
            Under `no_sync` gradients are whole at both stages; without it each micro-batch is reduced into shards.
        overlap: let the next forward pass begin before all parameters are there: each module waits for its own. Needs a
            `DataParallel`; see `fasttrain.parallel.zero_gather` for what reads parameters past it. Without it, `step`
            returns when all are there.
        rotating: buckets at stage 2.
        options: of the optimizer.

    Attributes:
        inner: the optimizer of this rank's pieces.
        stage: 1 or 2.

    Raises:
        ValueError, TypeError: an option is wrong; parameters without a wrapper, of several, or only some of one; a wire
            that shards cannot travel by; parameters that share memory.
        DisagreementError: the ranks give different options; the same text on every rank.

    Example:
        >>> from fasttrain.optim import AdamW
        >>> from fasttrain.parallel import DataParallel, Zero
        >>> model = DataParallel(torch.nn.Linear(2, 1))                                 # doctest: +SKIP
        >>> optimizer = Zero(model, AdamW, stage=2, lr=1e-3, weight_decay=0.1)          # doctest: +SKIP
        >>> model(torch.ones(4, 2)).sum().backward()                                    # doctest: +SKIP
        >>> norm = optimizer.clip_grad_norm_(1.0)                                       # doctest: +SKIP
        >>> optimizer.step()                                                            # doctest: +SKIP
        >>> checkpoint = optimizer.consolidate()  # on every rank; a state dict on rank 0 # doctest: +SKIP
    """

    _built = False

    def __init__(self, params: Any, optimizer_class: Callable[..., torch.optim.Optimizer], *, stage: int = 1,
                 overlap: bool = False, rotating: int = 4, **options: Any):
        if stage not in (1, 2):
            raise ValueError(f"stage={stage!r}: give 1 or 2; stage 0 is DataParallel with any optimizer, stage 3 is "
                             "fasttrain.parallel.shard with an optimizer of this package")
        self.stage = stage
        module, given = (params.module, params.module.named_parameters()) if hasattr(params, "reducer") else \
            (None, zip(params.names, params.params, strict=True)) if isinstance(params, Reducer) else (None, params)
        super().__init__(given, {})
        groups = [{**group, "params": [p for p in group["params"] if p.requires_grad]} for group in self.param_groups]
        self.reducer: Reducer = reducer_of([p for group in groups for p in group["params"]])
        if overlap and module is None:
            raise ValueError("overlap=True needs the modules that use the parameters: give the DataParallel itself")
        travels = check_wire(self.reducer)
        check_memory(self.reducer.params, self.reducer.names)
        self._names = dict(zip(self.reducer.params, self.reducer.names, strict=True))
        self._where = {p: (g, i) for g, group in enumerate(self.param_groups) for i, p in enumerate(group["params"])}
        of_ours = isinstance(optimizer_class, type) and issubclass(optimizer_class, Optimizer)
        # Without memory, to check the options, and to know what the whole would be.
        self._pattern = optimizer_class(patterns(self.param_groups), **options) if of_ours else None
        if self._pattern is None:
            check_divisible(False, None, self.reducer.params, self.reducer.names, optimizer_class)
            optimizer_class(samples(self.param_groups, self.reducer.wire.device), **options)  # raises before any change
        params_of = [group["params"] for group in self.param_groups]
        self.divided = divisible(self._pattern, params_of)
        check_divisible(self.divided, self._pattern, self.reducer.params, self.reducer.names, optimizer_class)
        plans = self.reducer.layout.buckets
        divided = divisions(self.reducer.reach)
        cuts = cuts_of(plans, divided, None if self.divided else costs(self._pattern, params_of, self._names))
        agree(self.reducer.wire, fingerprint([], FlatLayout.of([], 1), {
            "zero": stage, "optimizer": optimizer_class, "divided": self.divided, "rotating": rotating,
            "groups": [[self._names.get(p, "frozen") for p in group] for group in params_of]}))
        self._divide(cuts, divided, travels, rotating)
        self._options(optimizer_class, options)
        self._gathering = Gathering(self._memories, module if overlap else None)
        self._remember()
        others_refused(self)
        self._built = True

    def _divide(self, cuts: list[Cut], divided: dict[str, Division], travels: torch.dtype | None,
                rotating: int) -> None:
        """Have buckets and parameters lie as they are cut."""
        reducer = self.reducer
        self.method = Scatter(cuts, reducer.reach, divided, travels, self.stage == 2)
        reducer.shard(self.method, rotation(reducer.layout.buckets, reducer.reach, rotating)
                      if self.stage == 2 else None)
        self.method.lay(reducer.buckets, reducer.params, reducer.names)
        with torch.no_grad():
            memories = [[Memory(bucket, dtype, cut, divided[bucket.plan.group].wire)
                         for dtype in dict.fromkeys(p.dtype for p in bucket.params)]
                        for bucket, cut in zip(reducer.buckets, cuts, strict=True)]
            self._pieces = pieces({group: one.wire.rank for group, one in divided.items()}, reducer.buckets, cuts,
                                  memories, self._where, self._names, self._pattern, not self.divided)
        self._memories = [memory for together in memories for memory in together]

    def _options(self, optimizer_class: Callable[..., torch.optim.Optimizer], options: dict[str, Any]) -> None:
        """Make the inner optimizer, and take over its options as those of the groups."""
        groups = []
        for index, group in enumerate(self.param_groups):
            mine = [piece for piece in self._pieces if piece.where[0] == index]
            rest = {key: value for key, value in group.items() if key not in OWN}
            groups.append({**rest, "params": [piece.param for piece in mine],
                           "param_names": [piece.called for piece in mine]})
        self.inner = optimizer_class(groups, **options)
        self.defaults = self.inner.defaults
        self._stochastic = [any(number & STOCHASTIC for place in range(len(group["params"]))
                                for number in codecs_of(self._pattern, (index, place)))
                            for index, group in enumerate(self._pattern.param_groups)] if self._pattern else []
        for group, own in zip(self.param_groups, self.inner.param_groups, strict=True):
            for key in [key for key in group if key not in OWN and key not in own]:
                del group[key]  # the name of a preset, for example, which the inner one has resolved
        self._pull()

    # --- torch's surface ----------------------------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients; they become None whatever is given."""
        self.method.drop()
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raises RuntimeError: what each rank owns was laid out with all parameters."""
        if self._built:
            raise RuntimeError("what each rank owns was laid out when Zero was made: give it all groups then; to thaw "
                               "parameters, consolidate() the state, make DataParallel and Zero anew, and load it")
        super().add_param_group(param_group)

    def consolidate(self, to: int | None = 0) -> dict[str, Any]:
        """The state dict of the optimizer that is not divided. A collective: every rank calls it.

        Arguments:
            to: the rank that gets it, in the mesh; None: all.

        Returns:
            A new state dict, which `load_state_dict` of the optimizer's class and of any `Zero` takes, whatever its
            stage or number of ranks; {} on the other ranks.
        """
        self._push()  # what schedules wrote since the last step
        return zero_state.consolidate(self, to)

    def consolidate_state_dict(self, to: int = 0) -> None:
        """`consolidate`, by the name of torch's ZeroRedundancyOptimizer: `state_dict` returns it then."""
        self._consolidated = self.consolidate(to)

    def state_dict(self) -> dict[str, Any]:
        """What `consolidate_state_dict` brought to this rank since the last step.

        Raises:
            RuntimeError: nothing was: no rank has the whole state.
        """
        if not self._consolidated:
            raise RuntimeError("no rank has the whole state: call consolidate(to=...) on every rank, which returns it; "
                               "or consolidate_state_dict(to=...) on every rank before state_dict()")
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        found = self._consolidated.copy()
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, found)
            found = found if changed is None else changed
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state dict of an optimizer that is not divided, or of `consolidate`; every rank gives all of it.

        Raises:
            ValueError: it does not fit; nothing was changed.
        """
        state_dict = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        zero_state.load(self, state_dict)
        self._remember()
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def full_precision(self, to: int | None = None) -> list[Tensor]:
        """Every parameter with all digits that its master keeps, float32 (float64 of float64), in the groups' order.

        A collective: every rank calls it.

        Arguments:
            to: the rank that gets them, in the mesh; None: all.

        Returns:
            New tensors of the parameters' shapes; [] on the other ranks.
        """
        self.gather()
        return zero_weights.full_precision(self, to)

    def load_full_precision(self, weights: Sequence[Tensor]) -> None:
        """Set every parameter, and its master or remainder, from weights as `full_precision` returns them.

        A collective: every rank gives all of them.

        Raises:
            ValueError: they are not as many, or not of the parameters' shapes; nothing was changed.
        """
        self.gather()
        zero_weights.load_full_precision(self, weights)
        self._share()
        self.gather()

    def pieces(self) -> Iterator[tuple[str, int, int, dict[str, Any]]]:
        """For checkpoints: of each piece the parameter's name, the interval's first element and length, and its states.

        Elements are counted in the order of a slot (`fasttrain.dist.slots.Piece`).
        """
        for piece in self._pieces:
            yield piece.name, piece.first, piece.numel, self.inner.state.get(piece.param, {})

    def ranks_of(self, piece: Piece) -> list[int]:
        """The ranks among which the parameter of a piece is divided, by their numbers among all processes."""
        return self.method.divided[self.reducer.buckets[piece.bucket].plan.group].wire.ranks

    @property
    def _step_supports_amp_scaling(self) -> bool:
        raise RuntimeError("torch's GradScaler looks at this rank's gradients only, so that the ranks' scales would "
                           "drift apart: use fasttrain.LossScaler instead (scale, step)")
