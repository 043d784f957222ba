"""What a transformers model takes, by its class and configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from architectures import write_config  # noqa: E402

from sparse_onnx.core.errors import ImpossibleError  # noqa: E402
from sparse_onnx.export import hugging_face, interfaces  # noqa: E402

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 40}


def axes(model: torch.nn.Module) -> dict[str, dict[int, str]]:
    interface, _ = interfaces.of_model("model", model)
    with torch.no_grad():
        model(**interface.draw(interface.traced_sizes()))
    return {name: dict(spec.axes) for name, spec in interface.inputs.items()}


def test_an_encoder_with_a_decoder_has_two_lengths(tmp_path: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(write_config("t5", tmp_path / "t5"))
    model = transformers.T5ForConditionalGeneration(config).eval()
    assert axes(model) == {
        "input_ids": {0: "batch", 1: "sequence"},
        "attention_mask": {0: "batch", 1: "sequence"},
        "decoder_input_ids": {0: "batch", 1: "decoder_sequence"},
        "decoder_attention_mask": {0: "batch", 1: "decoder_sequence"},
    }


def test_experts_by_dataset_take_the_dataset() -> None:
    config = transformers.VitPoseBackboneConfig(
        **SMALL, image_size=[32, 48], patch_size=[16, 16], num_experts=3, part_features=8
    )
    model = transformers.VitPoseBackbone(config).eval()
    assert axes(model) == {"pixel_values": {0: "batch"}, "dataset_index": {0: "batch"}}
    interface, notes = interfaces.of_model("model", model)
    drawn = interface.draw({"batch": 50})["dataset_index"]
    assert set(drawn.tolist()) == {0, 1, 2} and notes == ()


def test_what_is_left_out_is_said() -> None:
    class Model(torch.nn.Module):
        main_input_name = "input_ids"
        config = transformers.Qwen3VLMoeConfig(text_config={"vocab_size": 50})

    interface, (note,) = interfaces.of_model("model", Model())
    assert list(interface.inputs) == ["input_ids", "attention_mask"] and "vision" in note


def test_other_inputs_are_refused_by_name() -> None:
    class Model(torch.nn.Module):
        main_input_name = "input_features"

    with pytest.raises(ImpossibleError, match="'input_features'"):
        interfaces.of_model("model", Model())


def test_a_pipeline_of_models_gives_its_first() -> None:
    config = transformers.MixtralConfig(
        **SMALL, vocab_size=50, num_local_experts=2, num_key_value_heads=2, num_experts_per_tok=1
    )

    class Pipeline(transformers.PreTrainedModel):
        config_class = transformers.MixtralConfig

        def __init__(self, config: object) -> None:
            super().__init__(config)
            self.other = torch.nn.Linear(2, 2)
            self.thinker = transformers.MixtralForCausalLM(config)

    pipeline = Pipeline(config)
    model, (note,) = hugging_face._callable(pipeline)
    assert model is pipeline.thinker and "'thinker'" in note
    assert hugging_face._callable(model) == (model, ())
