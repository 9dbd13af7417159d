"""Widgets to explore an MoE's experts in JupyterLab or Voila: linked views over :mod:`ones_lib.spectra`, drawn by
:mod:`ones_lib.views.figures.style`.

A layer is factored once; a move of the rank slider cuts the factors and draws anew only what depends on the rank.
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
from ones_lib.checkpoints.experts import ExpertBanks, open_experts
from ones_lib.ffn import FeedForwardWeights
from ones_lib.gathering.registry import gathering_methods, uses_calibration
from ones_lib.spectra import FactoredBank
from ones_lib.study.records import Record, Records, project_root
from ones_lib.study.running import record_activations
from ones_lib.views import figures

Source = Record | Path | str | nn.Module
DPI = 110
SMALL = 3e8  # multiplications of all experts' decompositions, below which a curve over ranks takes no noticeable time
VIEWS = ("spectra", "energy", "overlap", "output_error")


def _methods() -> list[str]:
    """Gatherings that the weights alone decide: the others take too long to follow a slider."""
    return [method for method in gathering_methods() if not uses_calibration(method)]


def moe_records(records: Records, first: Sequence[str] = ()) -> dict[str, Record]:
    """The MoEs among the records, by a name for people, to be an :class:`Explorer`'s sources; those in the folders ``first``
    before the others."""
    found = sorted(
        records.all("moe"), key=lambda r: first.index(r.folder.name) if r.folder.name in first else len(first)
    )
    result = {}
    for record in found:
        config, code = record.config, record.folder.name[-4:]
        made = "upcycling" if "upcycling" in config else "model"
        count, kind = config[made].get("num_experts", "?"), "upcycled, " if made == "upcycling" else ""
        result[f"{config['data']['name']}, {kind}{count} experts, seed {config['seed']} ({code})"] = record
    return result


class Explorer:
    """Controls, four linked views and a table of numbers for the experts of one layer at a time.

    Args:
        sources: by the name to show, records, safetensors files or folders, or models; a file can also be opened by its
            path in the widget. Of a record's model the output error is shown, on a batch of its own data.
        cache_dir: where records' data are kept.
        save_dir: where "save figures" writes, a folder a choice of controls; relative to the project's root.
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
        self._quiet = False  # while controls are set by the program
        self._make_controls()
        if self.sources:
            self._open(next(iter(self.sources)))
            self._say("ready", "ready")

    # --- the page ----------------------------------------------------------------------------------------------------

    def _make_controls(self) -> None:
        wide = {"style": {"description_width": "6em"}, "layout": widgets.Layout(width="25em")}
        self.source = widgets.Dropdown(
            options=list(self.sources), description="model", tooltip="a trained MoE, from the records", **wide
        )
        self.path = widgets.Text(
            placeholder="path of a .safetensors file or folder",
            description="or file",
            continuous_update=False,
            tooltip="an MoE's weights: press Enter to open; only the chosen layer's experts are read",
            **wide,
        )
        self.layer = widgets.Dropdown(description="layer", tooltip="one MoE feed-forward layer", **wide)
        self.matrix = widgets.Dropdown(
            description="matrix", tooltip="of each expert: up and gate read the token, down writes the output", **wide
        )
        self.experts = widgets.SelectMultiple(
            description="experts", rows=6, tooltip="which experts the views show; Ctrl or Shift for several", **wide
        )
        self.method = widgets.Dropdown(
            options=[(figures.NAMES.get(m, m), m) for m in _methods()],
            description="gathering",
            value="svd",
            tooltip="how the experts become one FFN",
            **wide,
        )
        self.rank = widgets.IntSlider(
            min=1, max=2, description="rank K", tooltip="what is kept of each expert; arrow keys move it", **wide
        )
        self.scale = widgets.ToggleButtons(
            options=[("linear", "linear"), ("log", "log"), ("energy", "energy")],
            value="log",
            description="spectra as",
            tooltips=["singular values", "singular values, logarithmic", "energy kept against rank"],
            style={"description_width": "6em", "button_width": "5.5em"},
            layout=widgets.Layout(width="26em"),
        )
        self.save = widgets.Button(description="save figures", icon="save", tooltip="each view as PNG, PDF and CSV")
        self.status = widgets.HTML()
        self.numbers = widgets.HTML()
        help_text = widgets.HTML(
            "<p style='line-height:1.3'>K: singular triplets that SVD-KG keeps of each expert, neurons that Top-KG does;"
            " also the dimension of the subspaces compared. Summation and averaging keep all.</p>"
        )
        self.source.observe(self._on(lambda: self._open(self.source.value)), "value")
        self.path.observe(self._on(self._open_path), "value")
        self.layer.observe(self._on(self._choose_layer), "value")
        for control in (self.matrix, self.experts, self.scale, self.method):
            control.observe(self._on(self._draw_all), "value")
        self.rank.observe(self._on(self._draw_rank), "value")
        self.save.on_click(lambda _: self._on(self._save)({}))
        controls = [self.source, self.path, self.layer, self.matrix, self.experts, self.scale, self.method, self.rank]
        left = widgets.VBox([*controls, help_text, self.save, self.status], layout=widgets.Layout(width="27em"))
        spectra_view, energy, overlap, error = (picture.widget for picture in self._pictures.values())
        right = widgets.VBox([widgets.HBox([spectra_view, energy]), overlap, error, self.numbers])
        self.widget = widgets.HBox([left, right], layout=widgets.Layout(flex_flow="row wrap"))

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.widget)

    def _on(self, action: Callable[[], None]) -> Callable[[dict], None]:
        def handle(change: dict) -> None:
            if not self._quiet:
                with self._busy("computing"):
                    action()

        return handle

    @contextmanager
    def _busy(self, what: str) -> Iterator[None]:
        """The status says what goes on, then how long it took, or what was wrong."""
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
        colour = {"error": "#b22222"}.get(state, "inherit")
        self.status.value = f'<div role="status" data-state="{state}" style="color:{colour}">{text}</div>'

    # --- what is chosen ----------------------------------------------------------------------------------------------

    def _open_path(self) -> None:
        if path := self.path.value.strip():
            banks = open_experts(path)  # before anything changes: it may be no such file
            self.sources[path] = Path(path)
            self._set(self.source, options=list(self.sources), value=path)
            self._show(self.sources[path], banks)

    def _open(self, name: str) -> None:
        source = self.sources[name]
        self._show(source, open_experts(source.weights_file if isinstance(source, Record) else source))

    def _show(self, source: Source, banks: ExpertBanks) -> None:
        activations, self._why_not = {}, "it needs a model from the records"
        if isinstance(source, Record):
            self._say("⏳ running the model on a batch …", "busy")
            try:
                activations = record_activations(source, self.cache_dir)
            except (OSError, ValueError) as error:  # its data may be gone: the weights can be looked at all the same
                self._why_not = str(error)
        self.banks, self.activations = banks, activations
        self._set(self.layer, options=list(banks), value=next(iter(banks)))
        self._choose_layer()

    def _choose_layer(self) -> None:
        bank = self.banks[self.layer.value]
        self._small = bank.up.numel() * min(bank.d_ff, bank.d_model) < SMALL
        self.factored = FactoredBank(bank)
        self.tables, self._pictures["output_error"].fig = {}, None
        count, full = bank.num_experts, self.factored.full_rank
        kept = self.matrix.value if self.matrix.value in self.factored.matrices else "up"
        options = [(figures.MATRIX_NAMES[m], m) for m in self.factored.matrices]
        self._set(self.matrix, options=options, value=kept)
        self._set(self.experts, options=list(range(count)), value=tuple(range(count)))
        self._set(self.rank, max=full, value=max(1, full // count), continuous_update=self._small)
        if not self._small:
            self._say(f"⏳ factoring {count} experts of {bank.d_ff} x {bank.d_model} …", "busy")
        self._draw_all()

    def _set(self, control: widgets.Widget, **values) -> None:
        """Change a control without its handler."""
        self._quiet = True
        try:
            for name, value in values.items():
                setattr(control, name, value)
        finally:
            self._quiet = False

    # --- views -------------------------------------------------------------------------------------------------------

    def _draw_all(self) -> None:
        """Everything that matrix, experts and scale decide, and then what the rank does."""
        if not self.experts.value:
            raise ValueError("experts: expected at least one to be chosen, found none")
        table = spectra.spectrum(self.factored, [self.matrix.value])
        self.tables["energy"] = table[table["expert"].isin(self.experts.value)]
        self._measures = spectra.rank_measures(self.tables["energy"])
        for view in ("spectra", "energy", "overlap"):
            self._pictures[view].fig = None
        self._draw_rank()

    def _draw_rank(self) -> None:
        """What the rank decides."""
        if self.factored is None:
            raise ValueError("model: expected one to be open, found none; give the path of a file")
        method, rank, matrix, shown = self.method.value, self.rank.value, self.matrix.value, self.experts.value
        gathered = self.factored.gather(method, rank if method in spectra.RANKED else None)
        overlap = spectra.overlap(self.factored, matrix, rank)
        self.tables["overlap"] = overlap[overlap["expert"].isin(shown) & overlap["other"].isin(shown)]
        self.tables["spectra"] = pd.concat(
            [self.tables["energy"], self._gathered_spectrum(gathered)], ignore_index=True
        )
        error = self._compute_error(gathered)
        for view, draw in self._views().items():
            self._pictures[view].show(draw(self._pictures[view].fig))
        if error is None:
            self._pictures["output_error"].say(f"no output error: {self._why_not}")
        self.numbers.value = self._numbers(gathered, error)

    def _gathered_spectrum(self, gathered: FeedForwardWeights) -> pd.DataFrame:
        s = torch.linalg.svdvals(getattr(gathered, self.matrix.value)).double().cpu().numpy()
        s[s < 1e-6 * s[0]] = 0  # beyond its rank, but for rounding
        table = {"rank": np.arange(len(s)) + 1, "singular_value": s, "energy": np.cumsum(s**2) / (s**2).sum()}
        return pd.DataFrame({"matrix": self.matrix.value, "expert": "gathered", **table}).head(self.factored.full_rank)

    def _compute_error(self, gathered: FeedForwardWeights) -> dict[str, float] | None:
        """Of the gathered FFN; and for the view of all methods over ranks, or for a large layer of what was looked at."""
        layer, known = self.activations.get(self.layer.value), self.tables.get("output_error")
        if layer is None:
            return None
        error = spectra.output_error(gathered, layer)
        if not self._small:
            here = pd.DataFrame([{"method": self.method.value, "rank": self.rank.value, **error}])
            seen = pd.concat([known, here]).drop_duplicates(["method", "rank"])
            self.tables["output_error"] = seen.sort_values(["method", "rank"])
            self._pictures["output_error"].fig = None
        elif known is None:
            methods, ranks = ["one_expert", *_methods()], spectra.rank_grid(self.factored.full_rank)
            self.tables["output_error"] = spectra.output_errors(self.factored, layer, methods, ranks)
        return error

    def _views(self) -> dict[str, Callable[[Figure | None], Figure]]:
        """How to draw what there is to show, anew or, of what depends on the rank, on a figure."""
        tables, rank = self.tables, self.rank.value
        views = {
            "spectra": lambda on: figures.expert_spectra(tables["spectra"], self.scale.value, rank, on),
            "energy": lambda on: figures.energy_by_expert(tables["energy"], rank, on),
            "overlap": lambda on: figures.overlap_heatmap(tables["overlap"], on, numbers=False),
            "output_error": lambda on: figures.output_errors(tables["output_error"], rank, on),
        }
        return {name: draw for name, draw in views.items() if name in tables}

    def _numbers(self, gathered: FeedForwardWeights, error: dict[str, float] | None) -> str:
        """The present choice in numbers, as an HTML table."""
        matrix, rank, method = (
            self.matrix.value,
            self.rank.value,
            figures.NAMES.get(self.method.value, self.method.value),
        )

        def text(values: pd.Series, digits: int = 1) -> str:
            return f"{values.mean():.{digits}f} ({values.min():.{digits}f} to {values.max():.{digits}f})"

        energy = self.tables["energy"].query("rank == @rank")["energy"]
        rows = [
            ("stable rank of the experts", text(self._measures["stable_rank"])),
            ("effective rank", text(self._measures["effective_rank"])),
            ("elbow; rank that keeps 90%", f"{text(self._measures['elbow'])}; {text(self._measures['rank_90'])}"),
            (f"energy kept at rank {rank}, %", text(100 * energy)),
        ]
        pairs = self.tables["overlap"].query("expert < other")
        for side, part in pairs.groupby("side", sort=False):
            words = f"{text(part['overlap'], 2)}; random {part['chance'].iloc[0]:.2f}"
            rows.append((f"overlap at rank {rank}, {figures.SIDE_NAMES[side]}", words))
        layer, bank = self.activations.get(self.layer.value), self.factored.bank
        if self._small and gathered.d_ff == bank.d_ff:
            weights = torch.ones(bank.num_experts) if layer is None else layer.expert_weights()
            found = spectra.matched_distances(gathered, self.factored.mean(weights)).set_index("matrix").loc[matrix]
            target = "mean of the experts" if layer is None else spectra.MEAN
            words = f"{found['distance']:.2f}; cosine {found['cosine']:.2f}"
            rows.append((f"{method}: distance from the {target}", words))
        if error:
            rows.append((f"{method}: output error", f"{error['error']:.3f}"))
            rows.append(
                (
                    "the same, output rescaled by the best number",
                    f"{error['rescaled']:.3f} (times {error['scale']:.3f})",
                )
            )
        cells = "".join(f"<tr><td style='padding-right:1.5em'>{html.escape(k)}</td><td>{v}</td></tr>" for k, v in rows)
        note = "<small>mean over the chosen experts or pairs (lowest to highest)</small>"
        return f"<table class='ones-numbers'>{cells}</table>{note}"

    def _save(self) -> None:
        parts = (self.source.value, self.layer.value, self.matrix.value, self.method.value, f"K{self.rank.value}")
        folder = self.save_dir / "_".join(re.sub(r"[^\w.-]+", "-", part) for part in parts)
        source = self.sources[self.source.value]
        origin = [source.folder.name] if isinstance(source, Record) else [self.banks.source]
        for name, draw in self._views().items():
            fig = draw(None)
            figures.save_figure(fig, name, self.tables[name], folder, origin)
            plt.close(fig)
        self._say(f"saved as PNG, PDF and CSV in {html.escape(str(folder))}", "saved")


class _Picture:
    """A figure on the page, which can draw anew what depends on the rank, and only that, on what it has drawn before."""

    def __init__(self, name: str) -> None:
        self.name, self.widget = name, widgets.HTML()
        self.fig: Figure | None = None  # the one shown

    def say(self, text: str) -> None:
        self.fig, self.widget.value = None, f"<p>{html.escape(text)}</p>"

    def show(self, fig: Figure) -> None:
        if fig is not self.fig:
            plt.close(fig)  # pyplot forgets it, we keep it on a canvas of our own
            self.fig, self._canvas = fig, FigureCanvasAgg(fig)
            fig.set_dpi(DPI)
            fig.draw_without_rendering()  # works out the layout, which stays
            fig.set_layout_engine("none")
            for artist in figures.moving_artists(fig):
                artist.set_animated(True)
            self._canvas.draw()
            self._background = self._canvas.copy_from_bbox(fig.bbox)
        self._canvas.restore_region(self._background)
        for artist in figures.moving_artists(fig):
            artist.axes.draw_artist(artist)
        png = io.BytesIO()
        Image.fromarray(np.asarray(self._canvas.buffer_rgba())).save(png, "png", compress_level=1)
        data = base64.b64encode(png.getvalue()).decode()
        self.widget.value = f'<img alt="{self.name}" data-view="{self.name}" src="data:image/png;base64,{data}">'
