"""Adapters that PEFT saved compute here what they compute there, and the other way round.

Needs the packages peft and transformers, with small models of random weights: nothing is downloaded.
"""

import copy
import json

import pytest
import safetensors.torch
import torch
from torch import nn

import rosa_kernels as rk
from small_layers import randomise

peft = pytest.importorskip("peft", reason="needs the package peft")
transformers = pytest.importorskip("transformers", reason="needs the package transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers.*"),
    pytest.mark.filterwarnings("ignore::Warning:peft.*"),
]

VOCABULARY = 40
IDS = torch.arange(2, 26).view(2, 12)


def bert():
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config)


def llama():
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


CASES = {
    "bert": (bert, {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]}),
    "bert-sequence-task": (bert, {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "bert-embedding": (bert, {"target_modules": ["word_embeddings", "dense"]}),
    "bert-rslora": (bert, {"target_modules": ["query"], "use_rslora": True, "init_lora_weights": "gaussian"}),
    "llama-all-linear": (llama, {"target_modules": "all-linear"}),
    "llama-expression": (llama, {"target_modules": r".*layers\.1.*\.(q_proj|up_proj)"}),
    "llama-patterns": (
        llama,
        {
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {"q_proj": 5, r"layers\.0\.self_attn\.v_proj": 2, "not_there": 9},
            "alpha_pattern": {"^model.layers.1.mlp.down_proj": 3},
        },
    ),
}


def logits(model):
    return model(input_ids=IDS).logits


def gradients(model):
    model.zero_grad()
    y = logits(model)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def our_name(name):
    """PEFT's name of a parameter as this package has it."""
    name = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
    return name.removesuffix(".weight") if ".lora_" in name else name


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    """(model with PEFT's adapter, the folder it was saved to, a fresh base model)."""
    make, fields = CASES[request.param]
    theirs = peft.get_peft_model(make(), peft.LoraConfig(**({"r": 4, "lora_alpha": 6} | fields)))
    randomise(theirs, std=0.2).eval().save_pretrained(tmp_path)
    return theirs, tmp_path, make().eval()


def test_from_peft_agrees_in_outputs_and_gradients(backend, case):
    theirs, folder, base = case
    ours = rk.from_peft(folder, base)
    assert ours is base
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-5)
    expected = {our_name(name): gradient for name, gradient in gradients(theirs).items()}
    found = gradients(ours)
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)


def test_to_peft_is_what_peft_reads(case, tmp_path_factory):
    theirs, folder, base = case
    ours = rk.from_peft(folder, base)
    written = tmp_path_factory.mktemp("written")
    rk.to_peft(ours, written)
    reread = peft.PeftModel.from_pretrained(copy.deepcopy(theirs).unload(), written).eval()
    torch.testing.assert_close(logits(reread), logits(theirs))
    first, second = (safetensors.torch.load_file(path / "adapter_model.safetensors") for path in (folder, written))
    assert set(first) == set(second) and all(torch.equal(first[key], second[key]) for key in first)


def test_merging_agrees_with_peft(case):
    theirs, folder, base = case
    merged = rk.merge_and_unload(rk.from_peft(folder, base))
    expected = theirs.merge_and_unload().state_dict()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, expected[name])


def test_our_own_adapter_goes_to_peft_and_back(tmp_path):
    config = rk.LoRAConfig(
        r=3,
        lora_alpha=5,
        target_modules=["word_embeddings", "query", "classifier"],
        use_rslora=True,
        rank_pattern={"layer.1.*query": 6},
        alpha_pattern={"classifier": 2},
    )
    ours = randomise(rk.add_adapters(bert(), config), std=0.2).eval()
    rk.to_peft(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(bert(), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(rk.from_peft(tmp_path, bert().eval())), logits(ours))


def test_training_agrees_with_peft(case):
    theirs, folder, base = case
    ours = rk.from_peft(folder, base)
    for model in (theirs, ours):
        for parameter in model.parameters():
            parameter.grad = None
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(5):
            gradients(model)
            optimiser.step()
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_transformers(reentrant):
    model = randomise(
        rk.add_adapters(llama(), rk.LoRAConfig(r=2, target_modules=["q_proj", "down_proj"])), std=0.2
    ).train()
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    found = gradients(model)
    assert expected and set(found) == set(expected)
    assert all(gradient.abs().sum() > 0 for gradient in found.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


# Refusals


@pytest.mark.parametrize(
    "fields, text",
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    ],
)
def test_what_is_not_plain_lora_is_refused(fields, text, tmp_path):
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], **fields))
    theirs.save_pretrained(tmp_path)
    model = llama()
    with pytest.raises(ValueError, match=text):
        rk.from_peft(tmp_path, model)
    assert not any(isinstance(module, rk.nn.AdapterLayer) for module in model.modules())


def test_other_methods_are_refused(tmp_path):
    config = peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    peft.get_peft_model(llama(), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="peft_type 'LORA', got 'IA3'"):
        rk.from_peft(tmp_path, llama())


def test_models_that_do_not_fit_are_refused(tmp_path):
    peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no module model\.layers\.0\.self_attn\.q_proj"):
        rk.from_peft(tmp_path, bert())
    other = llama()
    other.model.layers[1].self_attn.q_proj = nn.Linear(16, 8)
    with pytest.raises(ValueError, match=r"layers.1.self_attn.q_proj.lora_B: expected shape \(8, 2\)"):
        rk.from_peft(tmp_path, other)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    for fault in ({"r": None}, {"r": 4}, {"lora_alpha": "x"}):
        path.write_text(json.dumps(config | fault))
        with pytest.raises(ValueError):
            rk.from_peft(tmp_path, llama())
    with pytest.raises(ValueError, match="from_peft reads it"):
        rk.load_adapters(llama(), _without_own_metadata(tmp_path))


def _without_own_metadata(folder):
    """PEFT's config beside a model file of this package, so that the config is what load_adapters stops at."""
    target = folder / "mixed"
    rk.save_adapters(rk.add_adapters(llama(), rk.LoRAConfig(r=2, target_modules=["q_proj"])), target)
    (target / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    return target


def test_sparse_parts_do_not_fit_in_peft_files(tmp_path):
    model = rk.add_adapters(llama(), rk.RoSAConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="sparse"):
        rk.to_peft(model, tmp_path)
