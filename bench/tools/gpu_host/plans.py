"""Forces what the heuristics would decide at a case's real size upon its tiny tensors.

Each decision is still asked for by the tiny call, at its usual cost. Then it is replaced by what the same function says
of the real size, or by the algorithm that the case names.
"""

import contextlib
import functools
import sys
from collections.abc import Iterator
from unittest import mock

from gpu_host.cases import FEATURES, Case
from rosa_kernels.backends.cuda import heuristics as cuda_heuristics
from rosa_kernels.backends.gpu import hardware
from rosa_kernels.backends.shapes import cdiv
from rosa_kernels.backends.triton import heuristics as triton_heuristics


class Plan:
    """What was decided: {"y" or "dx": algorithm, "dvalues": name}."""

    def __init__(self, case: Case):
        self.case, self.decided = case, {}
        self._heuristics = triton_heuristics if case.backend == "triton" else cuda_heuristics

    @contextlib.contextmanager
    def forced(self) -> Iterator["Plan"]:
        heuristics = self._heuristics
        stand_ins = {
            "choose_linear": self._linear(heuristics.choose_linear),
            "choose_sddmm": self._sddmm(heuristics.choose_sddmm),
            "low_rank_gradients_by_library": self._by_library(heuristics.low_rank_gradients_by_library),
        }
        _forget_what_is_cached()
        with contextlib.ExitStack() as stack:
            for name, stand_in in stand_ins.items():
                stack.enter_context(mock.patch.object(heuristics, name, stand_in))
            stack.enter_context(mock.patch.object(hardware, "splits_of", self._splits(hardware.splits_of)))
            if self.case.backend == "triton":
                from rosa_kernels.backends.triton import lora

                tiles = lambda length, block: max(2, cdiv(length, block))  # each has its part of dH
                stack.enter_context(mock.patch.object(lora, "cdiv", tiles))
            yield self
        _forget_what_is_cached()

    def check_asked(self) -> None:
        """A backend that took its algorithms from elsewhere was measured with others than the case's."""
        wanted = {"y"}
        if self.case.has_step:
            wanted |= {"dx", *(["dvalues"] if self.case.has_sparse else [])}
        if self.decided.keys() != wanted:
            raise RuntimeError(
                f"{self.case.name}: the heuristics were asked for {sorted(self.decided)}, not {sorted(wanted)}"
            )

    def _linear(self, choose):
        @functools.lru_cache(maxsize=4096)
        def choose_linear(call, rates):
            part = "y" if call.out_features == self.case.out_features else "dx"
            real = call._replace(T=self.case.tokens, out_features=FEATURES, in_features=FEATURES, nnz=self.case.nnz)
            forced = getattr(self.case, part)
            if forced is not None:
                self._check_legal(forced, real, rates)
            self.decided[part] = forced or choose(real, rates)
            return self.decided[part]

        return choose_linear

    def _check_legal(self, algorithm, real, rates) -> None:
        by_rates = (rates,) if self._heuristics is cuda_heuristics else ()
        legal = self._heuristics.linear_algorithms(real, *by_rates)
        if algorithm not in legal:
            raise ValueError(f"{self.case.name}: {algorithm} does not serve {real}, which {legal} do")

    def _sddmm(self, choose):
        @functools.lru_cache(maxsize=4096)
        def choose_sddmm(call, rates):
            real = call._replace(T=self.case.tokens, out_features=FEATURES, in_features=FEATURES, nnz=self.case.nnz)
            legal = self._heuristics.sddmm_algorithms(real)
            if self.case.dvalues is not None and self.case.dvalues not in legal:
                raise ValueError(f"{self.case.name}: {self.case.dvalues} does not serve {real}, which {legal} do")
            self.decided["dvalues"] = self.case.dvalues or choose(real, rates)
            return self.decided["dvalues"]

        return choose_sddmm

    def _by_library(self, decide):
        def low_rank_gradients_by_library(T, out_features, element_size, rates):
            decide(T, out_features, element_size, rates)
            return by_library(element_size, rates)

        @functools.cache
        def by_library(element_size, rates):
            return decide(self.case.tokens, FEATURES, element_size, rates)

        return low_rank_gradients_by_library

    def _splits(self, splits_of):
        """How many splits a kernel's sum has at the real size. Which kernel, the function says that asks."""
        tokens, nnz = self.case.tokens, self.case.nnz
        tokens_of_H, features_of_a_gradient = (64, 128) if self.case.backend == "triton" else (16, 64)
        real = {  # length, tiles
            "shrink": (FEATURES, cdiv(tokens, tokens_of_H)),
            "lora_grad": (tokens, FEATURES // features_of_a_gradient),
            "sddmm_tiled": (tokens, (FEATURES // 128) ** 2),
            "sddmm_blocks": (tokens, FEATURES // 16 * FEATURES // 64),
            "sddmm_entries": (tokens, cdiv(nnz, 64)),
            "sddmm": (tokens, cdiv(nnz, 64)),
        }

        @functools.cache
        def real_splits(asking, block, device, at_most):
            length, tiles = real[asking]
            return splits_of(length, block, tiles, device, at_most)[0]

        def stand_in(length, block, tiles, device, at_most):
            splits_of(length, block, tiles, device, at_most)
            return real_splits(sys._getframe(1).f_code.co_name, block, device, at_most), 1

        return stand_in


def _forget_what_is_cached() -> None:
    """Plans that a backend has kept by the sizes of a call, which are those of the next case too."""
    for name, module in list(sys.modules.items()):
        if name.startswith("rosa_kernels.backends"):
            for value in list(vars(module).values()):
                if hasattr(value, "cache_clear"):
                    value.cache_clear()
