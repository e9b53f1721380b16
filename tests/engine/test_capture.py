"""Captured steps repeat eager ones, whatever changes from step to step, and give up politely.

The graphs are `tests.engine.fake_graph`'s: operators recorded and repeated, with what a CUDA graph bakes in baked in.
"""

import logging

import pytest
import torch

from fastmim.engine import step as step_module
from fastmim.engine.capture import MOST_FORMS, GraphedStep, why_no_graph
from fastmim.engine.compiling import compile_blocks, repeated_blocks
from fastmim.engine.ema import Ema
from fastmim.engine.optimizer import create_optimizer, optimizer_state, set_lr, set_weight_decay
from fastmim.engine.rng import seed_step
from fastmim.engine.settings import OptimConfig
from fastmim.engine.step import TrainStep
from fastmim.methods import create_method, method_config
from fastmim.models import create_encoder
from tests.engine.fake_graph import FakeGraphs
from tests.engine.tiny_run import BATCH, SIZE, TinyMethod

CPU = torch.device("cpu")
NAN = float("nan")


def images(step, batch=BATCH, size=SIZE):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(step))


def train_step(method, *, stop=True, ema=None, precision="fp32", **optim):
    settings = OptimConfig(**{"lr": 0.01, **optim})
    optimizer = create_optimizer(method, settings, rates_on_device=True)
    return TrainStep(
        method,
        optimizer,
        settings,
        precision=precision,
        device=CPU,
        seed=7,
        micro_batch=BATCH // settings.accumulate,
        stop=stop,
        ema=ema,
    )


def losses(runner, step, count=20, start=0, size=SIZE):
    """Of `count` steps with a learning rate, and a decay if it has a schedule, that change at each."""
    result = []
    for i in range(start, start + count):
        seed_step(7, i, CPU)
        set_lr(step.optimizer, 0.01 * (i + 1) / count)
        if step.optim.weight_decay_end is not None:
            set_weight_decay(step.optimizer, 0.05 * (i + 1))
        result.append(float(runner(images(i, size=size), None, None, i).loss))
    return result


def tiny(seed=0):
    torch.manual_seed(seed)
    return TinyMethod()


def state_of(step):
    return {**step.method.state_dict(), **optimizer_state(step.optimizer)}


@pytest.mark.parametrize("name", ["adamw", "lamb"])
@pytest.mark.parametrize("decay_end", [None, 0.2])
def test_twenty_replayed_steps_are_the_eager_ones(name, decay_end):
    settings = {"name": name, "weight_decay_end": decay_end, "clip_grad_norm": 1.0, "accumulate": 2}
    eager, captured = (train_step(method := tiny(), ema=Ema(method, 0.9), **settings) for _ in range(2))
    graphs = FakeGraphs()
    runner = GraphedStep(captured, graphs)
    assert losses(runner, captured) == losses(eager, eager)
    assert (graphs.warm_ups, graphs.captures, graphs.replays) == (3, 1, 17)
    one, two = state_of(eager), state_of(captured)
    for key in one:
        assert torch.equal(one[key], two[key]), key
    for key, average in eager.ema.average.items():
        assert torch.equal(average, captured.ema.average[key]), key
    assert int(captured.index) == 20


@pytest.mark.parametrize("method_name", ["mae", "simmim", "a2mim", "mixedae", "fcmae"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_methods_can_be_captured(method_name, precision):
    model = "convnextv2_atto" if method_name == "fcmae" else "vit_tiny_patch16_224"
    size = 64
    steps = []
    for _ in range(2):
        torch.manual_seed(0)
        extra = {} if method_name == "fcmae" else {"depth": 2}
        encoder = create_encoder(model, img_size=size, drop_path_rate=0.1, **extra)
        method = create_method(method_name, encoder, method_config(method_name)(), (size, size))
        steps.append(train_step(method.train(), precision=precision))
    eager, captured = steps
    eager.weight_cache = False
    graphs = FakeGraphs()
    expected = losses(eager, eager, count=6, size=size)
    assert losses(GraphedStep(captured, graphs, warmup=1), captured, count=6, size=size) == expected
    assert graphs.replays == 5
    assert len(set(expected)) == 6  # fresh images and masks


def test_masks_are_fresh_in_every_replay():
    step = train_step(tiny())
    runner = GraphedStep(step, FakeGraphs(), warmup=0)
    same_images = images(0)
    drawn = {float(runner(same_images, None, None, i).loss) for i in range(5)}
    assert len(drawn) == 5
    assert step.method.seen[0].tolist() == [7, 4, 0]  # the graph's own tensor, filled by the last replay


def test_a_resumed_step_goes_on_with_its_own_index():
    step = train_step(tiny())
    runner = GraphedStep(step, FakeGraphs(), warmup=0)
    for index in (5, 6, 9):
        runner(images(index), None, None, index)
        assert step.method.seen[-1].tolist() == [7, index, 0]


@pytest.mark.parametrize("where", ["loss", "grad"])
def test_a_replay_notices_what_is_not_finite_before_the_optimizer(where, monkeypatch):
    monkeypatch.setattr(step_module, "injecting", lambda: True)
    monkeypatch.setattr(step_module, "inject", lambda place, n: NAN if (place, n) == (where, 5) else 1.0)
    step = train_step(tiny())
    runner = GraphedStep(step, FakeGraphs(), warmup=1)
    losses(runner, step, count=4)
    before = {key: tensor.clone() for key, tensor in state_of(step).items() if "norm.running" not in key}
    losses(runner, step, count=1, start=4)
    losses(runner, step, count=1, start=5)  # finite again, but the run is to stop
    for key, tensor in before.items():
        if "num_batches" not in key:
            assert torch.equal(tensor, state_of(step)[key]), key
    assert (int(step.bad_steps), int(step.first_bad)) == (1, 4)


def test_each_form_of_input_has_its_own_graph():
    step = train_step(tiny())
    graphs = FakeGraphs()
    runner = GraphedStep(step, graphs, warmup=0)
    for i, batch in enumerate((8, 4, 8, 4)):
        runner(images(i, batch), None, None, i)
    assert (graphs.captures, graphs.replays) == (2, 4)


def test_a_changed_setting_of_the_method_is_never_replayed_stale():
    step = train_step(tiny())
    graphs = FakeGraphs()
    runner = GraphedStep(step, graphs, warmup=0)
    runner(images(0), None, None, 0)
    step.method.eval()
    runner(images(1), None, None, 1)
    step.method.num_keep = 3
    runner(images(2), None, None, 2)
    assert graphs.captures == 3


def test_labels_and_indices_are_inputs_too():
    step = train_step(tiny())
    runner = GraphedStep(step, FakeGraphs(), warmup=0)
    for i in range(3):
        runner(images(i), torch.full((BATCH,), i), torch.arange(BATCH) + i, i)
    assert next(iter(runner._forms.values())).buffers["indices"].tolist() == list(range(2, BATCH + 2))


def test_pictures_show_the_replayed_step():
    eager, captured = train_step(tiny()), train_step(tiny())
    runner = GraphedStep(captured, FakeGraphs(), warmup=0)
    for i in range(3):
        seed_step(7, i, CPU)
        expected = eager(images(i), None, None, i, pictures=True).pictures()
        seed_step(7, i, CPU)
        got = runner(images(i), None, None, i, pictures=i == 2)
        assert (got.pictures is None) == (i < 2)
    assert torch.equal(got.pictures().reconstruction, expected.reconstruction)


class Reads(TinyMethod):
    """Looks at its loss on the host."""

    def forward(self, batch):
        output = super().forward(batch)
        if output.loss.item() < 0:
            raise AssertionError
        return output


def test_what_cannot_be_captured_goes_on_eagerly_and_says_so_once(caplog):
    torch.manual_seed(0)
    reading = train_step(Reads())
    plain = train_step(tiny())
    runner = GraphedStep(reading, FakeGraphs(), warmup=2)
    with caplog.at_level(logging.WARNING):
        got = losses(runner, reading, count=6)
    assert got == losses(plain, plain, count=6)
    assert len(caplog.records) == 1
    assert "without graphs" in caplog.text
    assert "not permitted when stream is capturing" in caplog.text


def test_graph_on_makes_it_an_error():
    runner = GraphedStep(train_step(Reads()), FakeGraphs(), warmup=0, must=True)
    with pytest.raises(RuntimeError, match=r"engine\.graph: on .* cannot be captured"):
        runner(images(0), None, None, 0)


def test_too_many_forms_fall_back(caplog):
    step = train_step(tiny())
    runner = GraphedStep(step, FakeGraphs(), warmup=0)
    for i in range(MOST_FORMS + 2):
        runner(images(i, 2 + i), None, None, i)
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1
    assert f"more than {MOST_FORMS} forms" in caplog.text
    assert int(step.index) == MOST_FORMS + 2


def test_inputs_elsewhere_are_named():
    runner = GraphedStep(train_step(tiny()), FakeGraphs(), warmup=0)
    with pytest.raises(ValueError, match="step on cpu was given images on meta"):
        runner(images(0).to("meta"), None, None, 0)


def test_a_learning_rate_on_the_host_would_be_baked_in():
    """The fake graph shows the fault that tensors avoid."""
    method = tiny()
    settings = OptimConfig(lr=0.01)
    optimizer = create_optimizer(method, settings, rates_on_device=False)
    step = TrainStep(
        method, optimizer, settings, precision="fp32", device=CPU, seed=7, micro_batch=BATCH, stop=True, ema=None
    )
    other = train_step(tiny())
    assert losses(GraphedStep(step, FakeGraphs(), warmup=0), step) != losses(other, other)


def test_reasons_and_refusals():
    optimizer = train_step(tiny()).optimizer
    assert why_no_graph("off", CPU, optimizer) == "engine.graph is off"
    assert "need a CUDA device" in why_no_graph("auto", CPU, optimizer)
    with pytest.raises(ValueError, match=r"engine\.graph: on was asked for, but graphs need a CUDA device"):
        why_no_graph("on", CPU, optimizer)
    on_host = create_optimizer(tiny(), OptimConfig(), rates_on_device=False)
    assert "from the host" in why_no_graph("auto", torch.device("cuda"), on_host)
    assert why_no_graph("auto", torch.device("cuda"), optimizer) == ""


def test_the_repeated_blocks_are_those_of_encoder_and_decoder():
    encoder = create_encoder("vit_tiny_patch16_224", img_size=32, depth=3)
    method = create_method("mae", encoder, method_config("mae")(decoder_depth=2), (32, 32))
    kinds = [type(block).__name__ for block in repeated_blocks(method)]
    assert len(kinds) == 5
    assert len(set(kinds)) <= 2
    resnet = create_encoder("resnet18")
    assert {type(block).__name__ for block in repeated_blocks(resnet)} == {"BasicBlock"}
    assert len(repeated_blocks(resnet)) == 8


@pytest.mark.parametrize("method_name", ["mae", "simmim"])
def test_compiled_blocks_train_like_eager_ones(method_name):
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        encoder = create_encoder("vit_tiny_patch16_224", img_size=64, depth=2)
        method = create_method(method_name, encoder, method_config(method_name)(), (64, 64)).train()
        keys = list(method.state_dict())
        if compiled:
            assert compile_blocks(method, backend="aot_eager") >= 2
            assert list(method.state_dict()) == keys
        step = train_step(method)
        results.append(losses(step, step, count=20, size=64))
    assert results[1] == pytest.approx(results[0], rel=1e-4)


def test_nothing_to_compile_is_an_error():
    with pytest.raises(ValueError, match="no repeated blocks"):
        compile_blocks(tiny())


class ViewsMethod(TinyMethod):
    """Adds the mean of a second view, weighted by a schedule."""

    def schedules(self, total_steps, steps_per_epoch):
        return {"weight": lambda step: step / total_steps}

    def forward(self, batch):
        output = super().forward(batch)
        output.loss = output.loss + batch.schedules["weight"] * self.head(batch.views["small"]).mean()
        return output


def test_views_and_schedules_reach_a_replayed_step_fresh():
    results = []
    for captured in (False, True):
        torch.manual_seed(0)
        method = ViewsMethod()
        step = train_step(method)
        step._schedules = method.schedules(10, 5)
        step.scheduled = {"weight": torch.zeros(())}
        graphs = FakeGraphs()
        runner = GraphedStep(step, graphs, warmup=1) if captured else step
        views = [{"small": torch.randn(BATCH, 24, generator=torch.Generator().manual_seed(i))} for i in range(6)]
        results.append([float(runner(images(i), None, None, i, views=views[i]).loss) for i in range(6)])
    assert results[0] == results[1]
    assert graphs.replays == 5
