"""Inputs of one forward pass with an image, for every type of ``moe_types.yaml`` that takes images."""

import torch

_GRID = {"image_grid_thw": [[1, 4, 4]]}  # 4 x 4 patches, merged 2 x 2 to four tokens
_PLACES = {"image_position_ids": [[[x, y] for y in range(4) for x in range(4)]]}

# By the sizes in the yaml file: the shape of the pixel values, the number of image tokens, other arguments.
_IMAGES = {
    "aria": ((1, 3, 16, 16), 4, {}),
    "deepseek_ocr2": ((1, 3, 64, 64), 144 + 1, {}),  # 144 whatever the config, and a separator
    "diffusion_gemma": ((1, 16, 3 * 4 * 4), 4, _PLACES),
    "dots3_note": ((16, 3 * 4 * 4), 4, _GRID),
    "gemma4": ((1, 16, 3 * 2 * 2), 4, _PLACES),
    "glm4v_moe": ((16, 3 * 2 * 2 * 2), 4, _GRID),  # color, frame, row, column
    "glm5_next": ((16, 3 * 2 * 2 * 2), 4, _GRID),
    "hy_v4_vl": ((16, 3 * 2 * 2), 2 * (2 + 1), _GRID),  # two rows, each with a newline
    "inkling2": ((4, 4, 4, 3), 4, {"image_grid_thw": [[1, 2, 2]]}),  # patches come merged
    "inkling2_loop": ((4, 4, 4, 3), 4, {"image_grid_thw": [[1, 2, 2]]}),
    "kimi_k25": ((16, 3, 2, 2), 4, _GRID),
    "llama4": ((1, 3, 8, 8), 4, {}),
    "minimax_m3_vl": ((16, 3 * 2 * 2 * 2), 4, _GRID),
    "mistral_large4": ((1, 3, 8, 8), 4, {"image_sizes": [[8, 8]]}),
    "muse_spark": ((16, 3 * 2 * 2 * 2), 4, _GRID),
    "nemotron_h_omni": ((16, 3 * 4 * 4), 4, {"image_grid_hw": [[4, 4]]}),
    "qwen3_5_moe": ((16, 3 * 2 * 4 * 4), 4, _GRID),
    "qwen3_omni_moe": ((16, 3 * 2 * 4 * 4), 4, _GRID),
    "qwen3_omni_moe_thinker": ((16, 3 * 2 * 4 * 4), 4, _GRID),
    "qwen3_vl_moe": ((16, 3 * 2 * 4 * 4), 4, _GRID),
    "qwen4_exp": ((16, 3 * 2 * 4 * 4), 4, _GRID),
    "step3p7": ((1, 3, 32, 32), 4, {}),
    "unlimited_ocr": ((1, 3, 32, 32), 2 * (2 + 1) + 1, {}),  # newlines and a separator
}
_MARKED = {"diffusion_gemma", "gemma4", "glm4v_moe", "hy_v4_vl", "qwen3_5_moe", "qwen3_vl_moe", "qwen4_exp"}
KINDS = tuple(_IMAGES)


def image_inputs(kind, config):
    """Keyword arguments, the same every time; for Qwen-Omni as a whole those of ``model.thinker``."""
    shape, count, others = _IMAGES[kind]
    config = getattr(config, "thinker_config", config)
    generator = torch.Generator().manual_seed(5)
    text = torch.randint(11, 55, (1, 16), generator=generator)
    token = getattr(config, "image_token_id", None) or config.image_token_index
    start = [config.vision_start_token_id] if hasattr(config, "vision_start_token_id") else []
    ids = torch.cat([text[:, :5], torch.tensor([start + [token] * count]), text[:, 5:]], dim=1)
    inputs = {name: torch.tensor(value) for name, value in others.items()}
    inputs |= {"input_ids": ids, "pixel_values": torch.rand(shape, generator=generator)}
    inputs["attention_mask"] = torch.ones_like(ids)  # without, Qwen-Omni ignores where in the image a token is
    if kind in _MARKED:
        inputs["mm_token_type_ids"] = (ids == token).long()
    if kind == "diffusion_gemma":
        inputs["decoder_input_ids"] = text[:, : config.canvas_length]
    return inputs
