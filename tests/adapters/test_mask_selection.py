"""select_masks: the entries it picks, and that training goes on as if nothing had happened to anything else."""

import copy
import multiprocessing

import pytest
import torch
from torch import nn

import rosa_kernels as rk
from masked_net import BATCHES, TARGETS, loss_fn, make, select_on_one_rank
from rosa_kernels.adapters.mask_selection import top_k
from rosa_kernels.pattern import BLOCK, COLUMN, ROW


def dense_gradients(model, batches):
    """{name: [gradient of each batch]} of the base weights, by plain autograd on a plain copy."""
    plain = rk.merge_and_unload(copy.deepcopy(model)).requires_grad_(True)
    found = {name: [] for name in ("embedding", *TARGETS)}
    for batch in batches:
        plain.zero_grad()
        loss_fn(plain, batch).backward()
        for name, gradients in found.items():
            gradients.append(plain.get_submodule(name).weight.grad.clone())
    return found


def largest(score, k):
    mask = torch.zeros(score.numel(), dtype=torch.bool)
    mask[score.flatten().argsort(descending=True, stable=True)[:k]] = True
    return mask.view_as(score)


SCORES = {
    "gradient": lambda gradients, weight: torch.stack(gradients).mean(0).abs(),
    "fisher": lambda gradients, weight: torch.stack(gradients).square().mean(0),
    "snip": lambda gradients, weight: (torch.stack(gradients).mean(0) * weight).abs(),
    "magnitude": lambda gradients, weight: weight.abs(),
}


@pytest.mark.parametrize("mask", SCORES)
def test_the_highest_scores_win(backend, mask):
    model = make(mask=mask, mask_batches=3)
    gradients = dense_gradients(model, BATCHES[:3])
    patterns = rk.select_masks(model, BATCHES, loss_fn)  # reads three of the four
    assert list(patterns) == TARGETS
    for name in TARGETS:
        layer = model.get_submodule(name)
        score = SCORES[mask](gradients[name], layer.weight.detach())
        assert torch.equal(patterns[name].to_mask(), largest(score, round(0.2 * score.numel())))
        assert layer.sparse_pattern() == patterns[name]


@pytest.mark.parametrize("structure", ["row", "column", "block"])
def test_structures(structure):
    model = make(structure=structure, block_size=4, density=0.3)
    gradients = dense_gradients(model, BATCHES)
    patterns = rk.select_masks(model, BATCHES, loss_fn)
    for name in TARGETS:
        score = SCORES["gradient"](gradients[name], None)
        out_features, in_features = score.shape
        mask = patterns[name].to_mask()
        if structure == "row":
            assert torch.equal(mask.all(1), largest(score.sum(1), round(0.3 * out_features)))
        elif structure == "column":
            assert torch.equal(mask.all(0), largest(score.sum(0), round(0.3 * in_features)))
        else:
            down, across = -(-out_features // 4), -(-in_features // 4)
            blocks = torch.zeros(down, across)
            for i in range(down):
                for j in range(across):
                    blocks[i, j] = score[4 * i : 4 * i + 4, 4 * j : 4 * j + 4].sum()
            expected = rk.CSRPattern.from_blocks(largest(blocks, round(0.3 * down * across)), 4, score.shape)
            assert patterns[name] == expected
        assert patterns[name].structure in {"row": [ROW], "column": [COLUMN], "block": [BLOCK, COLUMN, ROW]}[structure]
        assert model.get_submodule(name).sparse_values.shape == (patterns[name].nnz,)


def test_global_scope_spends_the_total_where_it_counts():
    model = make(mask_scope="global")
    gradients = dense_gradients(model, BATCHES)
    held = {name: model.get_submodule(name).sparse_values for name in TARGETS}
    total = sum(values.numel() for values in held.values())
    patterns = rk.select_masks(model, BATCHES, loss_fn)
    scores = torch.cat([SCORES["gradient"](gradients[name], None).flatten() for name in TARGETS])
    assert torch.equal(torch.cat([patterns[name].to_mask().flatten() for name in TARGETS]), largest(scores, total))
    for name in TARGETS:
        values = model.get_submodule(name).sparse_values
        assert values is held[name] and values.shape == (patterns[name].nnz,) and values.eq(0).all()


def test_a_layer_may_end_up_with_nothing_under_the_global_scope():
    model = make(mask_scope="global", mask="magnitude")
    with torch.no_grad():
        model.first.weight.zero_()
    assert rk.select_masks(model)["first"].nnz == 0
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    loss_fn(model, BATCHES[0]).backward()
    optimiser.step()


def test_token_rows_never_include_padding():
    for mask in ("gradient", "magnitude", "random"):
        model = make(target_modules=["embedding"], density=1.0, mask=mask)
        rows = rk.select_masks(model, BATCHES, loss_fn)["embedding"].to_mask().all(1)
        assert not rows[0] and rows[1:].all()
    model = make(target_modules=["embedding"], density=0.25)
    score = SCORES["gradient"](dense_gradients(model, BATCHES)["embedding"], None).sum(1)
    pattern = rk.select_masks(model, BATCHES, loss_fn)["embedding"]
    assert torch.equal(pattern.to_mask().all(1), largest(score, 3)) and pattern.structure == ROW


def test_random_masks_follow_the_generator():
    def choose(seed):
        model = make(mask="random")
        return rk.select_masks(model, generator=torch.Generator().manual_seed(seed))["first"]

    assert choose(1) == choose(1) and choose(1) != choose(2)
    model = make(mask="random")
    torch.manual_seed(5)
    first = rk.select_masks(model)["first"]
    torch.manual_seed(5)
    assert rk.select_masks(make(mask="random"))["first"].nnz == first.nnz == 12


@pytest.mark.parametrize("k", [0, 1, 3, 5, 8])
def test_top_k_is_exact_and_takes_the_first_of_equals(k):
    scores = torch.tensor([1.0, 2, 2, 0, 2, 2, 1, 0])
    order = [1, 2, 4, 5, 0, 6, 3, 7]
    assert top_k(scores, k).nonzero()[:, 0].tolist() == sorted(order[:k])
    assert int(top_k(torch.zeros(1000), k).sum()) == k


def test_bf16_gradients_accumulate_in_fp32():
    model = make(mask="gradient", mask_batches=300, density=0.02).to(torch.bfloat16)

    def drifting_loss(model, step):
        # A gradient of 1 at one entry once, and of 1/256 at another 300 times: a bf16 sum would stop growing at 1.
        weight = model.first.weight
        return weight[0, 0] * (step == 0) + weight[1, 1] * 2.0**-8 + 0 * model.second.weight.sum()

    pattern = rk.select_masks(model, range(300), drifting_loss)["first"]
    assert pattern.nnz == 1 and pattern.to_mask()[1, 1]


def test_fp16_gradients_are_squared_in_fp32():
    model = make(mask="fisher", density=0.02).half()

    def loss(model, batch):
        weight = model.first.weight
        return weight[1, 1] * 1e-4 + weight[0, 0] * 0.9e-4 + 0 * model.second.weight.sum()  # both squares are 0 in fp16

    assert rk.select_masks(model, [None], loss)["first"].to_mask()[1, 1]


def test_a_compiled_model_is_scored_alike():
    eager, compiled = make(), make()
    compiled.load_state_dict(eager.state_dict())
    found = rk.select_masks(torch.compile(compiled, backend="aot_eager"), BATCHES, loss_fn)
    assert found == rk.select_masks(eager, BATCHES, loss_fn)


# What must not change


def test_training_goes_on_in_the_same_run(backend):
    model = make(r=2)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    parameters = dict(model.named_parameters())
    initial = copy.deepcopy(model.state_dict())

    def step():
        optimiser.zero_grad()
        loss_fn(model, BATCHES[0]).backward()
        optimiser.step()

    step()
    assert all(model.get_submodule(name).sparse_values.grad is None for name in TARGETS)
    before = model(BATCHES[1])
    rk.select_masks(model, BATCHES, loss_fn)
    assert torch.equal(model(BATCHES[1]), before), "S is zero still"
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    step()
    for name in TARGETS:
        layer = model.get_submodule(name)
        assert layer.sparse_values.ne(0).all() and not layer.weight.requires_grad
        assert torch.equal(layer.weight, initial[f"{name}.base_layer.weight"])


def test_no_gradient_and_no_flag_changes():
    model = make()
    loss_fn(model, BATCHES[0]).backward()
    parameters = dict(model.named_parameters())
    flags = {name: p.requires_grad for name, p in parameters.items()}
    gradients = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}

    def failing(model, batch):
        loss_fn(model, batch)
        raise KeyError("a loss that fails")

    with pytest.raises(KeyError):
        rk.select_masks(model, BATCHES, failing)
    assert not model.first.masks_selected
    with torch.no_grad():
        rk.select_masks(model, BATCHES, loss_fn)
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name] and parameter.requires_grad == flags[name]
        assert (parameter.grad is not None) == (name in gradients)
        assert parameter.grad is None or torch.equal(parameter.grad, gradients[name])


def test_sparse_only_adapters_can_be_scored():
    model = make(r=0, modules_to_save=[])
    rk.select_masks(model, BATCHES, loss_fn)
    loss_fn(model, BATCHES[0]).backward()
    assert model.first.sparse_values.grad.abs().sum() > 0


def test_tied_weights_are_scored_on_their_own():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(6, 4)
            self.out = nn.Linear(4, 6, bias=False)
            self.out.weight = self.table.weight

        def forward(self, ids):
            return self.out(self.table(ids)).square().mean()

    model = rk.add_adapters(Tied(), rk.RoSAConfig(r=1, density=0.3, target_modules=["table"]))
    pattern = rk.select_masks(model, [torch.tensor([1, 4])], lambda model, ids: model(ids))["table"]
    assert pattern.to_mask().all(1).nonzero()[:, 0].tolist() == [1, 4], "only these tokens were looked up"
    assert model.out.weight is model.table.weight


def test_layers_put_in_by_hand():
    model = nn.Sequential(rk.nn.RoSALinear(nn.Linear(6, 6), 1, 1, density=0.1), rk.nn.LoRALinear(nn.Linear(6, 6), 1, 1))
    x = torch.randn(3, 6)
    assert list(rk.select_masks(model, [x], lambda model, x: model(x).square().sum())) == ["0"]


# Refusals


def refused(text, model=None, batches=BATCHES, loss=loss_fn, **fields):
    model = model or make(**fields)
    with pytest.raises(ValueError, match=text):
        rk.select_masks(model, batches, loss)
    return model


def test_refusals():
    refused("at least one batch", batches=[])
    refused("needs both", batches=None)
    refused("needs both", loss=None)
    refused("scalar", loss=lambda model, batch: model(batch))
    refused("scalar", loss=lambda model, batch: 1.0)
    refused("constant", loss=lambda model, batch: torch.tensor(1.0))
    refused("depend on second", loss=lambda model, batch: model.first(model.embedding(batch)).sum())
    refused("first: its scores are not finite", loss=lambda model, batch: loss_fn(model, batch) * float("nan"))
    refused("no layer has a sparse part", density=0)
    refused("no layer has a sparse part", model=nn.Linear(2, 2))
    model = make()
    rk.merge_adapters(model)
    refused("merged", model=model)
    model = make()
    rk.select_masks(model, BATCHES, loss_fn)
    values = model.first.sparse_values.data.normal_().clone()
    refused("chosen already", model=model)
    assert torch.equal(model.first.sparse_values, values)


def test_a_base_without_a_plain_weight_is_refused():
    class Quantised(nn.Linear):
        pass

    model = nn.Sequential(Quantised(4, 4))
    rk.add_adapters(model, rk.RoSAConfig(r=1, density=0.2))
    refused("pattern by hand", model=model, batches=[torch.randn(2, 4)], loss=lambda model, x: model(x).sum())


def test_values_are_not_resized_inside_ddp(one_process_group):
    model = nn.parallel.DistributedDataParallel(make(mask_scope="global"), find_unused_parameters=True)
    refused("choose masks before wrapping", model=model)
    assert not model.module.first.masks_selected
    model = nn.parallel.DistributedDataParallel(make(), find_unused_parameters=True)
    assert list(rk.select_masks(model, BATCHES, loss_fn)) == ["first", "second"]


@pytest.mark.exhaustive
def test_all_ranks_choose_the_same(tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    arguments = [(rank, tmp_path / "store", results) for rank in (0, 1)]
    processes = [context.Process(target=select_on_one_rank, args=args) for args in arguments]
    for process in processes:
        process.start()
    for process in processes:  # what they put in the queue is small enough for its pipe
        process.join(timeout=120)
        assert process.exitcode == 0
    chosen = dict(results.get(timeout=10) for _ in processes)
    assert chosen[0] == chosen[1]
    torch.manual_seed(0)
    whole = rk.select_masks(make(), BATCHES, loss_fn)
    assert chosen[0][0]["first"] == whole["first"].col_indices.tolist()
