"""Measures what one GPU shows, without notebooks; see on_gpu.sh. Every table names the card.

``gpu_dispatch.csv``: ways of dispatch; ``gpu_inference.csv``: the MoE against its student; ``gpu_images.csv``: accuracy and
seconds of every training of the image study. What was measured before is found again.
"""

import argparse
import time
from pathlib import Path

import pandas as pd
import timm

from ones_lib.data.files import written_beside
from ones_lib.study import entries as compare
from ones_lib.study.parameters import Parameters, read_parameters
from ones_lib.study.records import provenance
from ones_lib.study.running import build_model
from ones_lib.study.study import make_study
from ones_lib.study.tables import results_table
from ones_lib.views.speed import available_modes, measure_dispatch, measure_speed


def dispatch_times(p: Parameters) -> pd.DataFrame:
    parts = [
        measure_dispatch(name, layer, layer["batch_sizes"], p.speed_precisions, p.seconds)
        for name, layer in p.speed_layers.items()
    ]
    return pd.concat(parts, ignore_index=True)


def inference_times(p: Parameters) -> pd.DataFrame:
    study = make_study("image", p)
    own = build_model(study.moe(study.seeds[0]), study.open_data())
    cases = [("images", own, p.speed_batch_sizes, p.speed_modes)]
    cases += [(name, timm.create_model(name), p.large_batch_sizes, p.large_modes) for name in p.large_models]
    parts = [
        measure_speed(name, model, batch_sizes, p.seconds, p.speed_precisions, available_modes(modes))
        for name, model, batch_sizes, modes in cases
    ]
    return pd.concat(parts, ignore_index=True)


def image_results(p: Parameters) -> pd.DataFrame:
    study = make_study("image", p)
    entries = compare.by_budget(study, [*p.methods, *p.calibrated_methods], [p.kd_steps])
    records = study.run([entry.config for entry in entries], "images")
    table = results_table(entries, study.records)
    seconds = {record.folder.name: record.result["wall_seconds"] for record in records}
    return table.assign(seconds=table["record"].map(seconds), device=provenance()["device"]).drop(columns="record")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what one GPU shows.", allow_abbrev=False)
    parser.add_argument("out", type=Path, help="folder of the tables")
    parser.add_argument("--profile", default="gpu")
    parser.add_argument("--data-dir", default="", help="CIFAR-10 in ImageNet's layout")
    options = parser.parse_args()
    overrides = {"data_dir": options.data_dir} if options.data_dir else {}
    p = read_parameters(options.profile, overrides, ["image", "speed"])
    for name, measure in {"images": image_results, "dispatch": dispatch_times, "inference": inference_times}.items():
        started, path = time.perf_counter(), options.out / f"gpu_{name}.csv"
        if not path.exists():
            table = measure(p)
            with written_beside(path) as beside:
                table.to_csv(beside, index=False, float_format="%.6f")
        print(f"{path.name}: {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
