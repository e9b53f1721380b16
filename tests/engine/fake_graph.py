"""Graph capture on a CPU, with the semantics that make captured steps go wrong on a GPU.

While capturing, every operator is recorded with its arguments: tensors by identity, numbers as they are then. Nothing
that is recorded takes effect yet: tensors that exist already, and the random generator, get their states back. A replay
repeats the operators on the same tensors. So what a CUDA graph bakes in is baked in here (a learning rate that is a
Python number, a step counted on the host), and what it refuses is refused (reading a value on the host).
"""

from contextlib import nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

_WRITES_UNSAID = {"aten::native_batch_norm", "aten::_native_batch_norm_legit", "aten::cudnn_batch_norm"}  # statistics
_HOST_READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal"}


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []
        self.made = set()  # storages that were allocated while recording
        self.kept = {}  # storage -> (a tensor over all of it, its values before)
        self.alive = []  # so that no address is given out twice

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._schema.name in _HOST_READS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func._schema.name}")
        inputs = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
        mutates = func._schema.is_mutable or func._schema.name in _WRITES_UNSAID
        if mutates:
            for tensor in inputs:
                self._keep(tensor)
        outputs = func(*args, **kwargs)
        results = [t for t in tree_flatten(outputs)[0] if isinstance(t, torch.Tensor)]
        known = {_storage(t) for t in inputs}
        fresh = [_storage(t) not in known for t in results]
        self.made.update(_storage(t) for t, new in zip(results, fresh, strict=True) if new)
        self.alive += inputs + results
        if mutates or any(fresh):
            self.calls.append((func, args, kwargs, results, fresh))
        return outputs

    def _keep(self, tensor):
        place = _storage(tensor)
        if place not in self.made and place not in self.kept:
            whole = tensor.detach().as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
            self.kept[place] = (whole, whole.clone())

    def put_back(self):
        for whole, values in self.kept.values():
            whole.copy_(values)

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, results, fresh in self.calls:
            again = [t for t in tree_flatten(func(*args, **kwargs))[0] if isinstance(t, torch.Tensor)]
            for old, new, wanted in zip(results, again, fresh, strict=True):
                if wanted:
                    old.detach().copy_(new)


class FakeGraphs:
    """`fastmim.engine.capture.Graphs` without a GPU; counts what it is asked for."""

    def __init__(self):
        self.captures = self.replays = self.warm_ups = 0

    def warm_up(self):
        self.warm_ups += 1
        return nullcontext()

    def capture(self, body):
        recorder = _Recorder()
        generator = torch.get_rng_state()
        try:
            with recorder:
                output = body()
        finally:
            with torch.no_grad():
                recorder.put_back()
            torch.set_rng_state(generator)
        self.captures += 1

        def replay():
            self.replays += 1
            recorder.replay()

        return replay, output


def _storage(tensor):
    return tensor.untyped_storage().data_ptr()
