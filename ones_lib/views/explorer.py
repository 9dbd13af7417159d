"""Widgets to explore an MoE's experts in JupyterLab or Voila: linked views of :mod:`ones_lib.spectra`'s tables.

A layer is factored once. When the rank moves, the factors are only cut, and only what depends on the rank is drawn again.
"""

from __future__ import annotations

import base64
import html
import io
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import ipywidgets as widgets
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from ones_lib import spectra
from ones_lib.checkpoints.activations import split_tokens
from ones_lib.checkpoints.experts import ExpertBanks, open_experts
from ones_lib.ffn import FeedForwardWeights
from ones_lib.gathering.registry import gather, gathering_methods, uses_calibration
from ones_lib.spectra import FactoredBank
from ones_lib.study.records import Record, Records, project_root
from ones_lib.study.running import record_activations
from ones_lib.views import figures

Source = Record | Path | str | nn.Module
DPI = 110
SMALL = 3e8  # multiplications to decompose all experts; below this the curve over all ranks takes no noticeable time
REGRESSIONS = ("readout", "fit")  # gatherings shown of layers whose activations are known
FIT_STEPS = 200  # a fifth of the fit's default, for an answer in seconds
VIEWS = ("spectra", "energy", "overlap", "output_error")


def _methods() -> list[str]:
    """Gatherings of weights alone, which can follow a slider."""
    return [method for method in gathering_methods() if not uses_calibration(method)]


def _named(methods: Sequence[str]) -> list[tuple[str, str]]:
    """Options of a control for methods: the names to show, and their own."""
    return [(figures.look(method).name, method) for method in methods]


def moe_records(records: Records, first: Sequence[str] = ()) -> dict[str, Record]:
    """The MoEs of images and text among the records as sources for an :class:`Explorer`, by a readable name; those in the
    folders ``first`` come first, in that order."""
    result = {}
    for record in records.all("moe"):
        if record.config["domain"] == "language":  # of transformers: open its checkpoint's folder
            continue
        config, upcycled = record.config, "upcycling" in record.config
        count = config["upcycling" if upcycled else "model"].get("num_experts", "?")
        kind = f"{'upcycled, ' if upcycled else ''}{count} experts, seed {config['seed']}"
        result[f"{config['data']['name']}, {kind} ({record.folder.name[-4:]})"] = record
    place = {folder: i for i, folder in enumerate(first)}
    return dict(sorted(result.items(), key=lambda item: place.get(item[1].folder.name, len(first))))


class Explorer:
    """Controls, four linked views and a table of numbers for the experts of one layer at a time.

    Args:
        sources: records, safetensors files or folders, or models, by the name to show. Other files can be opened by their
            path in the widget. The output error is shown only for records, on a batch of their own data: read-out and fit
            are solved on three quarters of its tokens, and all errors are those on the rest. The fit runs once it is chosen.
        cache_dir: where records' data are kept, relative to the project's root.
        save_dir: where "save figures" writes, a folder for each choice of controls; relative to the project's root.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        cache_dir: str | Path = "runs/cache",
        save_dir: str | Path = "runs/explorer",
    ) -> None:
        self.sources, self.save_dir = dict(sources), Path(save_dir)
        self.cache_dir = project_root() / cache_dir
        self.banks: ExpertBanks | None = None
        self.factored: FactoredBank | None = None
        self.activations: dict = {}
        self.tables: dict[str, pd.DataFrame] = {}  # what each view shows
        self._pictures = {view: _Picture(view.replace("_", " ")) for view in VIEWS}
        self._quiet = False  # while the program, not the user, sets controls
        self._make_controls()
        self._lay_out()
        if self.sources:
            self._open(next(iter(self.sources)))
            self._say("ready", "ready")

    # --- the page ----------------------------------------------------------------------------------------------------

    def _make_controls(self) -> None:
        def wide(kind: type[widgets.Widget], description: str, tooltip: str, **options) -> widgets.Widget:
            look = {"style": {"description_width": "6em"}, "layout": widgets.Layout(width="25em")}
            return kind(description=description, tooltip=tooltip, **look, **options)

        self.source = wide(widgets.Dropdown, "model", "a trained MoE from the records", options=list(self.sources))
        path = {"placeholder": "path of a .safetensors file or folder", "continuous_update": False}
        self.path = wide(widgets.Text, "or file", "weights of an MoE: press Enter to open them", **path)
        self.layer = wide(widgets.Dropdown, "layer", "one MoE feed-forward layer")
        matrices = "of each expert: up and gate read the token, down writes the output"
        self.matrix = wide(widgets.Dropdown, "matrix", matrices)
        several = "which experts the views show; Ctrl or Shift for several"
        self.experts = wide(widgets.SelectMultiple, "experts", several, rows=6)
        methods = {"options": _named(_methods()), "value": "svd"}
        self.method = wide(widgets.Dropdown, "gathering", "how the experts become one FFN", **methods)
        kept = "what is kept of each expert; arrow keys move it"
        self.rank = wide(widgets.IntSlider, "rank K", kept, min=1, max=2)
        units = "hidden units of read-out and fit: one expert's, two experts', ..."
        self.width = wide(widgets.SelectionSlider, "width", units, options=[1], continuous_update=False)
        self.scale = widgets.ToggleButtons(
            options=["linear", "log", "energy"],
            value="log",
            description="spectra as",
            tooltips=["singular values", "singular values, logarithmic", "energy kept against rank"],
            style={"description_width": "6em", "button_width": "5.5em"},
            layout=widgets.Layout(width="26em"),
        )
        self.save = widgets.Button(description="save figures", icon="save", tooltip="each view as PNG, PDF and CSV")
        self.status, self.numbers = widgets.HTML(), widgets.HTML()
        self.source.observe(self._on(lambda: self._open(self.source.value)), "value")
        self.path.observe(self._on(self._open_path), "value")
        self.layer.observe(self._on(self._choose_layer), "value")
        for control in (self.matrix, self.experts, self.scale, self.method):
            control.observe(self._on(self._draw_all), "value")
        for control in (self.rank, self.width):
            control.observe(self._on(self._draw_rank), "value")
        self.save.on_click(self._on(self._save))

    def _lay_out(self) -> None:
        help_text = widgets.HTML(
            "<p style='line-height:1.3'>K: singular triplets (SVD-KG) or neurons (Top-KG) kept of each expert;"
            " also the dimension of the subspaces compared. Summation and averaging keep everything."
            f" Read-out and fit have a width instead, and see data; the fit ({FIT_STEPS} steps) runs when it is chosen.</p>"
        )
        controls = [self.source, self.path, self.layer, self.matrix, self.experts, self.scale]
        controls += [self.method, self.rank, self.width]
        left = widgets.VBox([*controls, help_text, self.save, self.status], layout=widgets.Layout(width="27em"))
        spectra_view, energy, overlap, error = (picture.widget for picture in self._pictures.values())
        right = widgets.VBox([widgets.HBox([spectra_view, energy]), overlap, error, self.numbers])
        self.widget = widgets.HBox([left, right], layout=widgets.Layout(flex_flow="row wrap"))

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.widget)

    def _on(self, action: Callable[[], None]) -> Callable[[object], None]:
        """A handler for a control's event, which shows errors in the status."""

        def handle(_: object) -> None:
            if not self._quiet:
                with self._busy("computing"):
                    action()

        return handle

    @contextmanager
    def _busy(self, what: str) -> Iterator[None]:
        """The status says what goes on, and then how long it took or what was wrong."""
        started = time.perf_counter()
        self._say(f"⏳ {what} …", "busy")
        try:
            yield
        except (OSError, ValueError) as error:
            self._say(html.escape(str(error)), "error")
        else:
            if 'data-state="busy"' in self.status.value:
                self._say(f"ready, {1000 * (time.perf_counter() - started):.0f} ms", "ready")

    def _say(self, text: str, state: str) -> None:
        colour = "#b22222" if state == "error" else "inherit"
        self.status.value = f'<div role="status" data-state="{state}" style="color:{colour}">{text}</div>'

    # --- what is chosen ----------------------------------------------------------------------------------------------

    def _open_path(self) -> None:
        if path := self.path.value.strip():
            banks = open_experts(path)  # an error must leave the controls as they are
            self.sources[path] = Path(path).expanduser()
            self._set(self.source, options=list(self.sources), value=path)
            self._show(self.sources[path], banks)

    def _open(self, name: str) -> None:
        source = self.sources[name]
        self._show(source, open_experts(source.weights_file if isinstance(source, Record) else source))

    def _show(self, source: Source, banks: ExpertBanks) -> None:
        self.banks, self.activations, self._why_no_error = banks, {}, "it needs a model from the records"
        if isinstance(source, Record):
            self._say("⏳ running the model on a batch …", "busy")
            try:
                self.activations = record_activations(source, self.cache_dir)
            except (OSError, ValueError) as error:  # its data are gone; the weights can still be shown
                self._why_no_error = str(error)
        self._set(self.layer, options=list(banks), value=next(iter(banks)))
        self._choose_layer()

    def _choose_layer(self) -> None:
        bank = self.banks[self.layer.value]
        self._small = bank.up.numel() * min(bank.d_ff, bank.d_model) < SMALL
        self.factored = FactoredBank(bank)
        self.tables, self._pictures["output_error"].fig = {}, None
        self._given, self._held_out, self._solved, self._shown = None, None, {}, None
        if (seen := self.activations.get(self.layer.value)) is not None:
            self._given, self._held_out = split_tokens(seen)
        methods = [*_methods(), *(REGRESSIONS if seen is not None else ())]
        method = self.method.value if self.method.value in methods else "svd"
        self._set(self.method, options=_named(methods), value=method)
        widths = [m * bank.d_ff for m in range(1, bank.num_experts + 1)]
        self._set(self.width, options=widths, value=bank.d_ff, disabled=seen is None)
        count, full = bank.num_experts, self.factored.full_rank
        matrix = self.matrix.value if self.matrix.value in self.factored.matrices else "up"
        self._set(self.matrix, options=[(figures.MATRIX_NAMES[m], m) for m in self.factored.matrices], value=matrix)
        self._set(self.experts, options=list(range(count)), value=tuple(range(count)))
        self._set(self.rank, max=full, value=max(1, full // count), continuous_update=self._small)
        if not self._small:
            self._say(f"⏳ factoring {count} experts of {bank.d_ff} x {bank.d_model} …", "busy")
        self._draw_all()

    def _set(self, control: widgets.Widget, **values) -> None:
        """Change a control without calling its handler."""
        self._quiet = True
        try:
            for name, value in values.items():
                setattr(control, name, value)
        finally:
            self._quiet = False

    # --- views -------------------------------------------------------------------------------------------------------

    def _draw_all(self) -> None:
        """Draw what matrix, experts and scale decide, and then what the rank does."""
        if not self.experts.value:
            raise ValueError("experts: expected at least one to be chosen, found none")
        table = spectra.spectrum(self.factored, [self.matrix.value])
        self.tables["energy"] = table[table["expert"].isin(self.experts.value)]
        self._measures = spectra.rank_measures(self.tables["energy"])
        for view in ("spectra", "energy", "overlap"):
            self._pictures[view].fig = None
        self._draw_rank()

    def _draw_rank(self) -> None:
        """Draw what rank and width decide."""
        if self.factored is None:
            raise ValueError("model: expected one to be open, found none; give the path of a file")
        rank, matrix, shown = self.rank.value, self.matrix.value, self.experts.value
        gathered = self._gather(self.method.value)
        overlap = spectra.overlap(self.factored, matrix, rank)
        self.tables["overlap"] = overlap[overlap["expert"].isin(shown) & overlap["other"].isin(shown)]
        both = [self.tables["energy"], self._gathered_spectrum(gathered)]
        self.tables["spectra"] = pd.concat(both, ignore_index=True)
        error = self._output_error(gathered)
        for view, draw in self._views().items():
            self._pictures[view].show(draw(self._pictures[view].fig))
        if error is None:
            self._pictures["output_error"].say(f"no output error: {self._why_no_error}")
        self.numbers.value = _html_table([*self._expert_numbers(), *self._gathered_numbers(gathered, error)])

    def _gather(self, method: str) -> FeedForwardWeights:
        """The experts gathered with the chosen rank or width. What is solved is kept until another layer is chosen."""
        if method not in REGRESSIONS:
            return self.factored.gather(method, self.rank.value if method in spectra.RANKED else None)
        width = self.width.value
        if (method, width) not in self._solved:
            self._say(f"⏳ {figures.look(method).name}: solving for {width} hidden units …", "busy")
            options = {"steps": FIT_STEPS} if method == "fit" else {}
            self._solved[method, width] = gather(self.factored.bank, method, self._given, d_ff=width, **options)
        return self._solved[method, width]

    def _gathered_spectrum(self, gathered: FeedForwardWeights) -> pd.DataFrame:
        s = torch.linalg.svdvals(getattr(gathered, self.matrix.value)).double().cpu().numpy()
        s[s < 1e-6 * s[0]] = 0  # rounding errors beyond its rank
        table = {"rank": np.arange(len(s)) + 1, "singular_value": s, "energy": np.cumsum(s**2) / (s**2).sum()}
        return pd.DataFrame({"matrix": self.matrix.value, "expert": "gathered", **table}).head(self.factored.full_rank)

    def _output_error(self, gathered: FeedForwardWeights) -> dict[str, float] | None:
        """The gathered FFN's output error.

        The view's table has all methods and ranks, the fit only if it has been chosen; of a large layer only those looked
        at. It has read-out and fit at the chosen width.
        """
        if self._held_out is None:
            return None
        error = spectra.output_error(gathered, self._held_out)
        if self._small:
            self._compare_all()
        else:
            method, width = self.method.value, self.width.value
            units = {"d_ff": width} if method in REGRESSIONS else {}
            here = pd.DataFrame([{"method": method, "rank": self.rank.value, **units, **error}])
            seen = pd.concat([self.tables.get("output_error"), here]).drop_duplicates(["method", "rank"], keep="last")
            if "d_ff" in seen:
                seen = seen[seen["d_ff"].isna() | (seen["d_ff"] == width)].dropna(axis=1, how="all")
            self.tables["output_error"] = seen.sort_values(["method", "rank"])
            self._pictures["output_error"].fig = None
        return error

    def _compare_all(self) -> None:
        """Make the table of output errors of a small layer, unless it is there."""
        width, ranks = self.width.value, spectra.rank_grid(self.factored.full_rank)
        regressions = [m for m in REGRESSIONS if m == "readout" or (m, width) in self._solved]
        if self._shown == (width, regressions):
            return
        if self._shown is None:
            methods = ["one_expert", *_methods()]
            self._of_weights = spectra.output_errors(self.factored, self._held_out, methods, ranks)
        errors = {m: spectra.output_error(self._gather(m), self._held_out) for m in regressions}
        rows = [{"method": m, "rank": rank, "d_ff": width, **errors[m]} for m in regressions for rank in ranks]
        self.tables["output_error"] = pd.concat([self._of_weights, pd.DataFrame(rows)], ignore_index=True)
        self._shown, self._pictures["output_error"].fig = (width, regressions), None

    def _views(self) -> dict[str, Callable[[Figure | None], Figure]]:
        """How to draw each view that has a table: anew (None), or only what moves, on a figure."""
        tables, rank = self.tables, self.rank.value
        views = {
            "spectra": lambda on: figures.expert_spectra(tables["spectra"], self.scale.value, rank, on),
            "energy": lambda on: figures.energy_by_expert(tables["energy"], rank, on),
            "overlap": lambda on: figures.overlap_heatmap(tables["overlap"], on, numbers=False),
            "output_error": lambda on: figures.output_errors(tables["output_error"], rank, on),
        }
        return {name: draw for name, draw in views.items() if name in tables}

    def _expert_numbers(self) -> Iterator[tuple[str, str]]:
        """Numbers of the chosen experts: mean over experts or pairs, lowest and highest."""

        def text(values: pd.Series, digits: int = 1) -> str:
            return f"{values.mean():.{digits}f} ({values.min():.{digits}f} to {values.max():.{digits}f})"

        rank, table = self.rank.value, self.tables["energy"]
        yield "stable rank of the experts", text(self._measures["stable_rank"])
        yield "effective rank", text(self._measures["effective_rank"])
        yield "elbow; rank that keeps 90%", f"{text(self._measures['elbow'])}; {text(self._measures['rank_90'])}"
        yield f"energy kept at rank {rank}, %", text(100 * table.loc[table["rank"] == rank, "energy"])
        pairs = self.tables["overlap"].query("expert < other")
        for side, part in pairs.groupby("side", sort=False):
            words = f"{text(part['overlap'], 2)}; random {part['chance'].iloc[0]:.2f}"
            yield f"overlap at rank {rank}, {figures.SIDE_NAMES[side]}", words

    def _gathered_numbers(
        self, gathered: FeedForwardWeights, error: dict[str, float] | None
    ) -> Iterator[tuple[str, str]]:
        """Numbers of the gathered FFN: its distance from the experts' mean, and its output error."""
        name, layer = figures.look(self.method.value).name, self.activations.get(self.layer.value)
        if self.method.value in REGRESSIONS:
            name = f"{name}, {gathered.d_ff} hidden units"
        bank = self.factored.bank
        if self._small and gathered.d_ff == bank.d_ff:
            weights = torch.ones(bank.num_experts) if layer is None else layer.expert_weights()
            distances = spectra.matched_distances(gathered, self.factored.mean(weights)).set_index("matrix")
            distance, cosine = distances.loc[self.matrix.value, ["distance", "cosine"]]
            target = "mean of the experts" if layer is None else spectra.MEAN
            yield f"{name}: distance from the {target}", f"{distance:.2f}; cosine {cosine:.2f}"
        if error:
            yield f"{name}: output error", f"{error['error']:.3f}"
            yield "with the best output scale", f"{error['rescaled']:.3f} (times {error['scale']:.3f})"

    def _save(self) -> None:
        parts = [self.source.value, self.layer.value, self.matrix.value, self.method.value, f"K{self.rank.value}"]
        if self._held_out is not None:
            parts.append(f"d{self.width.value}")
        folder = self.save_dir / "_".join(re.sub(r"[^\w.-]+", "-", part) for part in parts)
        source = self.sources[self.source.value]
        origin = source.folder.name if isinstance(source, Record) else self.banks.source
        for name, draw in self._views().items():
            fig = draw(None)
            figures.save_figure(fig, name, self.tables[name], folder, [origin])
            plt.close(fig)
        self._say(f"saved as PNG, PDF and CSV in {html.escape(str(folder))}", "saved")


def _html_table(rows: list[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><td style='padding-right:1.5em'>{html.escape(k)}</td><td>{v}</td></tr>" for k, v in rows)
    note = "<small>mean over the chosen experts or pairs (lowest to highest)</small>"
    return f"<table class='ones-numbers'>{cells}</table>{note}"


class _Picture:
    """A figure on the page. What does not depend on the rank is drawn once and kept as the background."""

    def __init__(self, name: str) -> None:
        self.name, self.widget = name, widgets.HTML()
        self.fig: Figure | None = None  # the one shown

    def say(self, text: str) -> None:
        self.fig, self.widget.value = None, f"<p>{html.escape(text)}</p>"

    def show(self, fig: Figure) -> None:
        if fig is not self.fig:
            self._draw_background(fig)
        self._canvas.restore_region(self._background)
        for artist in figures.moving_artists(fig):
            artist.axes.draw_artist(artist)
        png = io.BytesIO()
        Image.fromarray(np.asarray(self._canvas.buffer_rgba())).save(png, "png", compress_level=1)
        data = base64.b64encode(png.getvalue()).decode()
        self.widget.value = f'<img alt="{self.name}" data-view="{self.name}" src="data:image/png;base64,{data}">'

    def _draw_background(self, fig: Figure) -> None:
        plt.close(fig)  # pyplot forgets it; it lives on a canvas of our own
        self.fig, self._canvas = fig, FigureCanvasAgg(fig)
        fig.set_dpi(DPI)
        fig.draw_without_rendering()  # computes the layout, which stays
        fig.set_layout_engine("none")
        for artist in figures.moving_artists(fig):
            artist.set_animated(True)
        self._canvas.draw()
        self._background = self._canvas.copy_from_bbox(fig.bbox)
