"""LoRAConfig and RoSAConfig refuse what they cannot mean."""

import pytest

import rosa_kernels as rk


@pytest.mark.parametrize(
    "kind, fields, error, text",
    [
        (rk.LoRAConfig, {"r": 0}, ValueError, "r: expected at least 1"),
        (rk.RoSAConfig, {"r": -1}, ValueError, "r: expected at least 0"),
        (rk.LoRAConfig, {"r": "8"}, TypeError, "r: expected an integer"),
        (rk.LoRAConfig, {"lora_dropout": 1.1}, ValueError, "lora_dropout"),
        (rk.LoRAConfig, {"rank_pattern": {"a": 0}}, ValueError, "rank_pattern"),
        (rk.LoRAConfig, {"target_modules": "("}, ValueError, "regular expression"),
        (rk.LoRAConfig, {"target_modules": []}, ValueError, "at least one"),
        (rk.LoRAConfig, {"modules_to_save": "head"}, TypeError, "list of names"),
        (rk.LoRAConfig, {"use_rslora": 1}, TypeError, "use_rslora"),
        (rk.RoSAConfig, {"density": -0.1}, ValueError, "density"),
        (rk.RoSAConfig, {"structure": "tile"}, ValueError, "structure"),
        (rk.RoSAConfig, {"mask": "best"}, ValueError, "mask"),
        (rk.RoSAConfig, {"mask_scope": "model"}, ValueError, "mask_scope"),
        (rk.RoSAConfig, {"mask_scope": "global", "structure": "row"}, ValueError, "mask_scope"),
        (rk.RoSAConfig, {"mask_batches": 0}, ValueError, "mask_batches"),
        (rk.RoSAConfig, {"block_size": 0}, ValueError, "block_size"),
    ],
)
def test_configs_refuse(kind, fields, error, text):
    with pytest.raises(error, match=text):
        kind(**fields)
