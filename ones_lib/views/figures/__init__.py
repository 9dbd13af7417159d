# ruff: noqa: F401  what notebooks, the explorer and tests call
"""Figures of result tables, a file for each notebook's.

Every function draws what its table holds and computes nothing else, so a figure can be drawn again from the CSV beside it.
"""

from ones_lib.views.figures.ablation import (
    gathering_budgets,
    gathering_errors,
    gathering_starts,
    gathering_times,
    variant_labels,
)
from ones_lib.views.figures.layer import (
    energy_by_expert,
    expert_spectra,
    moving_artists,
    output_errors,
    overlap_heatmap,
)
from ones_lib.views.figures.published import frontier, perplexity_by_time, perplexity_by_tokens, router_by_layer
from ones_lib.views.figures.results import (
    kept_by_benefit,
    learning_curves,
    retention_by_model,
    retention_by_speed,
    retention_curves,
    retention_text,
    sample_images,
    scores_by_model,
    scores_text,
    widths_text,
)
from ones_lib.views.figures.spectra import (
    SIDE_NAMES,
    expert_similarity,
    gathered_distances,
    overlap_curves,
    spectra_by_data,
)
from ones_lib.views.figures.speed import DISPATCHES, dispatch_speed, engine_speed, inference_speed
from ones_lib.views.figures.style import (
    MATRIX_NAMES,
    METHODS,
    ONE_COLUMN,
    TWO_COLUMNS,
    look,
    save_figure,
    save_table,
    set_style,
)
from ones_lib.views.figures.teachers import distillation_gains
